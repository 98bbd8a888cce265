//! Flow records.
pub mod mark;
