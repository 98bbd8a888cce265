//! The shunt daemon: a thin shell of kernel calls around [`proxy_core`].

pub mod control;
pub mod kernel;
