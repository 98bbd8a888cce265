//! temp
use crate::config::MarkMask;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkLayout { mask: u32 }
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End { Open=0, ClientFinished=1, BackendFinished=2, FinishedClientFirst=3, FinishedBackendFirst=4, ResetByClient=5, ResetByBackend=6, Cut=7 }
impl MarkLayout {
    pub const fn new(mask: MarkMask) -> Self { Self { mask: mask.bits() } }
    pub const fn end_mask(self) -> u32 { self.mask & (7 << self.mask.trailing_zeros()) }
    pub const fn id_mask(self) -> u32 { self.mask & !self.end_mask() }
    pub const fn route_mark(self, id: u32) -> Option<u32> {
        let shift = self.id_mask().trailing_zeros();
        let m = (id as u64) << shift;
        if id == 0 || m & !(self.id_mask() as u64) != 0 { None } else { Some(m as u32) }
    }
    pub const fn route_id(self, mark: u32) -> Option<u32> { let id = (mark & self.id_mask()) >> self.id_mask().trailing_zeros(); if id == 0 { None } else { Some(id) } }
    pub const fn end_bits(self, end: End) -> u32 { (end as u32) << self.mask.trailing_zeros() }
}
