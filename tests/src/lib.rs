//! Scenarios of shunt on the real kernel. The lab they run in is [`shunt_lab`], re-exported as [`lab`].

pub use shunt_lab as lab;
