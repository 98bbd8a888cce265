//! nf_tables in memory.
#[derive(Debug)]
pub struct MemoryNft;
