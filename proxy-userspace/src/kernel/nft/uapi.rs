//! Numbers of `include/uapi/linux/netfilter/nf_tables.h` that neither libc nor libnftnl's bindings name.

/// `NFNL_SUBSYS_NFTABLES`
pub const SUBSYSTEM: u16 = 10;
pub const BATCH_BEGIN: u16 = 0x10;
pub const BATCH_END: u16 = 0x11;

/// Message types, the low byte of `nlmsg_type`.
pub mod msg {
    pub const NEW_TABLE: u16 = 0;
    pub const GET_TABLE: u16 = 1;
    pub const DEL_TABLE: u16 = 2;
    pub const NEW_CHAIN: u16 = 3;
    pub const GET_CHAIN: u16 = 4;
    pub const DEL_CHAIN: u16 = 5;
    pub const NEW_RULE: u16 = 6;
    pub const GET_RULE: u16 = 7;
    pub const DEL_RULE: u16 = 8;
    pub const NEW_SET: u16 = 9;
    pub const GET_SET: u16 = 10;
    pub const DEL_SET: u16 = 11;
    pub const NEW_ELEMENT: u16 = 12;
    pub const GET_ELEMENT: u16 = 13;
    pub const DEL_ELEMENT: u16 = 14;
    pub const NEW_GENERATION: u16 = 15;
    pub const GET_GENERATION: u16 = 16;
    pub const NEW_OBJECT: u16 = 18;
    pub const GET_OBJECT: u16 = 19;
    pub const DEL_OBJECT: u16 = 20;
}

/// `NFTA_LIST_ELEM`, in every list.
pub const LIST_ITEM: u16 = 1;

/// `NFTA_TABLE_*`
pub mod table {
    pub const NAME: u16 = 1;
    pub const FLAGS: u16 = 2;
    pub const OWNER: u16 = 7;
    /// `NFT_TABLE_F_OWNER` (v5.12+)
    pub const F_OWNER: u32 = 1 << 1;
    /// `NFT_TABLE_F_PERSIST` (v6.9+)
    pub const F_PERSIST: u32 = 1 << 2;
}

/// `NFTA_CHAIN_*` and `NFTA_HOOK_*`
pub mod chain {
    pub const TABLE: u16 = 1;
    pub const NAME: u16 = 3;
    pub const HOOK: u16 = 4;
    pub const POLICY: u16 = 5;
    pub const TYPE: u16 = 7;
    pub const HOOK_NUMBER: u16 = 1;
    pub const HOOK_PRIORITY: u16 = 2;
    /// `NF_ACCEPT`
    pub const ACCEPT: u32 = 1;
}

/// `NFTA_RULE_*`
pub mod rule {
    pub const TABLE: u16 = 1;
    pub const CHAIN: u16 = 2;
}

/// `NFTA_SET_*`, `NFTA_SET_DESC_*` and `NFT_SET_*`
pub mod set {
    pub const TABLE: u16 = 1;
    pub const NAME: u16 = 2;
    pub const FLAGS: u16 = 3;
    pub const KEY_TYPE: u16 = 4;
    pub const KEY_LEN: u16 = 5;
    pub const DATA_TYPE: u16 = 6;
    pub const DATA_LEN: u16 = 7;
    pub const DESC: u16 = 9;
    pub const ID: u16 = 10;
    pub const TIMEOUT: u16 = 11;
    pub const USERDATA: u16 = 13;
    pub const EXPR: u16 = 17;
    pub const EXPRESSIONS: u16 = 18;
    /// Told by v6.18, not by v6.1.
    pub const COUNT: u16 = 20;
    pub const DESC_SIZE: u16 = 1;
    pub const F_INTERVAL: u32 = 0x4;
    pub const F_MAP: u32 = 0x8;
    pub const F_TIMEOUT: u32 = 0x10;
    pub const F_EVAL: u32 = 0x20;
    /// `NFT_DATA_VERDICT`
    pub const DATA_VERDICT: u32 = 0xffff_ff00;
}

/// `NFTA_SET_ELEM_LIST_*`, `NFTA_SET_ELEM_*`, `NFTA_DATA_*` and `NFTA_VERDICT_*`
pub mod element {
    pub const LIST_TABLE: u16 = 1;
    pub const LIST_SET: u16 = 2;
    pub const LIST_ELEMENTS: u16 = 3;
    pub const KEY: u16 = 1;
    pub const DATA: u16 = 2;
    pub const FLAGS: u16 = 3;
    pub const USERDATA: u16 = 6;
    pub const EXPR: u16 = 7;
    pub const F_INTERVAL_END: u32 = 1;
    pub const DATA_VALUE: u16 = 1;
    pub const DATA_VERDICT: u16 = 2;
    pub const VERDICT_CODE: u16 = 1;
    pub const VERDICT_CHAIN: u16 = 2;
}

/// `NFTA_EXPR_*` and `NFTA_COUNTER_*`
pub mod expr {
    pub const NAME: u16 = 1;
    pub const DATA: u16 = 2;
    pub const COUNTER_BYTES: u16 = 1;
    pub const COUNTER_PACKETS: u16 = 2;
}

/// `NFTA_OBJ_*`, `NFTA_CT_TIMEOUT_*`, `CTA_TIMEOUT_*` (`nfnetlink_cttimeout.h`)
pub mod object {
    pub const TABLE: u16 = 1;
    pub const NAME: u16 = 2;
    pub const TYPE: u16 = 3;
    pub const DATA: u16 = 4;
    pub const TYPE_CT_TIMEOUT: u32 = 7;
    pub const L3PROTO: u16 = 1;
    pub const L4PROTO: u16 = 2;
    pub const POLICY: u16 = 3;
    pub const TCP_SYN_SENT: u16 = 1;
    pub const TCP_SYN_RECV: u16 = 2;
    pub const TCP_ESTABLISHED: u16 = 3;
    pub const TCP_FIN_WAIT: u16 = 4;
    pub const TCP_CLOSE_WAIT: u16 = 5;
    pub const TCP_LAST_ACK: u16 = 6;
    pub const TCP_TIME_WAIT: u16 = 7;
    pub const TCP_CLOSE: u16 = 8;
    pub const TCP_SYN_SENT2: u16 = 9;
    pub const TCP_RETRANS: u16 = 10;
    pub const TCP_UNACK: u16 = 11;
    pub const UDP_UNREPLIED: u16 = 1;
    pub const UDP_REPLIED: u16 = 2;
}

/// `NFTA_GEN_*`
pub mod generation {
    pub const ID: u16 = 1;
    pub const PROCESS_ID: u16 = 2;
    pub const PROCESS_NAME: u16 = 3;
}

/// `enum nft_registers`: the n-th four bytes of the scratch area a rule has. A field that starts on a 16-byte border has
/// to name the wide register, as the kernel does when it tells a rule back (`nft_dump_register`).
pub const fn register(word: u32) -> u32 {
    if word.is_multiple_of(4) { 1 + word / 4 } else { 8 + word }
}

/// `NFT_GOTO`, `NFT_JUMP`, `NFT_RETURN`, `NF_ACCEPT`
pub mod verdict {
    pub const JUMP: i32 = -3;
    pub const GOTO: i32 = -4;
    pub const RETURN: i32 = -5;
    pub const ACCEPT: i32 = 1;
}
