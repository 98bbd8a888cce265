//! Which parts of nf_tables the kernel has.

use std::io;

use super::netlink::{Message, SUBSYS_NFTABLES, attribute, batch};

/// What the kernel's nf_tables has in the `inet` family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NftFacts {
    /// `type nat` chains.
    pub nat_chain: bool,
    pub nat: bool,
    pub masquerade: bool,
    pub fib: bool,
    pub reject: bool,
    pub ct: bool,
    /// Sets that the packet path fills.
    pub dynset: bool,
    pub limit: bool,
    pub numgen: bool,
    pub hash: bool,
    pub connlimit: bool,
    /// `socket`, which finds the socket a packet is for.
    pub socket: bool,
    /// `ct timeout` objects.
    pub ct_timeout: bool,
    /// `NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST`
    pub owner_persist: bool,
    pub flowtable: bool,
}

impl NftFacts {
    /// Everything the `nft` engine cannot do without.
    pub fn forwards(&self) -> bool {
        self.missing().is_empty()
    }

    /// What the `nft` engine cannot do without and the kernel lacks: the configuration options that bring it.
    pub fn missing(&self) -> Vec<&'static str> {
        let parts = [
            (self.nat_chain, "CONFIG_NFT_NAT"),
            (self.nat, "CONFIG_NFT_NAT"),
            (self.masquerade, "CONFIG_NFT_MASQ"),
            (self.fib, "CONFIG_NFT_FIB_INET"),
            (self.reject, "CONFIG_NFT_REJECT_INET"),
            (self.ct, "CONFIG_NFT_CT"),
            (self.dynset, "CONFIG_NF_TABLES"),
            (self.limit, "CONFIG_NFT_LIMIT"),
        ];
        let mut missing: Vec<_> = parts.into_iter().filter(|(there, _)| !there).map(|(_, option)| option).collect();
        missing.dedup();
        missing
    }
}

const INET: u8 = libc::NFPROTO_INET as u8;
const PROBE: &str = "shunt-probe";
const OWNED: &str = "shunt-probe-owner";
const TABLE_OWNER: u32 = 1 << 1;
const TABLE_PERSIST: u32 = 1 << 2;
const MSG_NEWFLOWTABLE: i32 = 22;
const OBJECT_CT_TIMEOUT: u32 = 7;
const MASQ_REG_PROTO_MIN: u16 = 2;

/// Sends the batch and reads the facts off the refusals.
pub(super) fn ask() -> io::Result<NftFacts> {
    let mut messages = vec![
        new(libc::NFT_MSG_NEWTABLE).string(1, PROBE),
        new(libc::NFT_MSG_NEWCHAIN).string(1, PROBE).string(3, "probe"),
        new(libc::NFT_MSG_NEWTABLE).string(1, OWNED).be32(2, TABLE_OWNER | TABLE_PERSIST),
        nat_chain_at_a_hook_it_cannot_have(),
        // NFTA_OBJ_TABLE, _NAME, _TYPE, _DATA
        new(libc::NFT_MSG_NEWOBJ).string(1, PROBE).string(2, "probe").be32(3, OBJECT_CT_TIMEOUT).nested(4, &[]),
        // NFTA_FLOWTABLE_TABLE, _NAME, _HOOK
        new(MSG_NEWFLOWTABLE).string(1, PROBE).string(2, "probe").nested(3, &[]),
        // Without attributes it would be complete: a register that does not exist makes it fail.
        rule("masq", &attribute(MASQ_REG_PROTO_MIN, &0xffff_u32.to_be_bytes())),
    ];
    let first_expression = messages.len();
    const EXPRESSIONS: [&str; 10] =
        ["nat", "fib", "reject", "ct", "dynset", "limit", "numgen", "hash", "connlimit", "socket"];
    messages.extend(EXPRESSIONS.map(|name| rule(name, &[])));

    let results = batch(&messages)?;
    let result = |index: usize| results.get(index).copied().unwrap_or(libc::ENOENT);
    if let Some(code) = [result(0), result(1)].into_iter().find(|code| *code != 0) {
        return Err(io::Error::from_raw_os_error(code));
    }
    let known = |index: usize| !matches!(result(index), libc::ENOENT | libc::EOPNOTSUPP);
    let expression = |name: &str| {
        EXPRESSIONS.iter().position(|known| *known == name).is_some_and(|index| known(first_expression + index))
    };
    Ok(NftFacts {
        // Known types refuse the hook with EOPNOTSUPP, unknown ones are ENOENT (nft_chain_parse_hook, v6.18).
        nat_chain: result(3) != libc::ENOENT,
        nat: expression("nat"),
        masquerade: known(6),
        fib: expression("fib"),
        reject: expression("reject"),
        ct: expression("ct"),
        dynset: expression("dynset"),
        limit: expression("limit"),
        numgen: expression("numgen"),
        hash: expression("hash"),
        connlimit: expression("connlimit"),
        socket: expression("socket"),
        ct_timeout: known(4),
        owner_persist: result(2) == 0,
        flowtable: known(5),
    })
}

fn new(message: i32) -> Message {
    Message::new(SUBSYS_NFTABLES, message as u8, INET, libc::NLM_F_CREATE | libc::NLM_F_ACK)
}

/// NFTA_RULE_TABLE, _CHAIN, _EXPRESSIONS { NFTA_LIST_ELEM { NFTA_EXPR_NAME, NFTA_EXPR_DATA } }
fn rule(expression: &str, data: &[u8]) -> Message {
    let mut body = attribute(1, format!("{expression}\0").as_bytes());
    body.extend(attribute(2 | 1 << 15, data));
    let element = attribute(1 | 1 << 15, &body);
    new(libc::NFT_MSG_NEWRULE).string(1, PROBE).string(2, "probe").nested(4, &element)
}

/// NFTA_CHAIN_TABLE, _NAME, _HOOK { _HOOKNUM, _PRIORITY }, _TYPE. Chains of type nat do not hook into forward.
fn nat_chain_at_a_hook_it_cannot_have() -> Message {
    let mut hook = attribute(1, &(libc::NF_INET_FORWARD as u32).to_be_bytes());
    hook.extend(attribute(2, &0_u32.to_be_bytes()));
    new(libc::NFT_MSG_NEWCHAIN).string(1, PROBE).string(3, "probe-nat").nested(4, &hook).string(7, "nat")
}
