//! The shunt daemon: a thin shell of kernel calls around [`proxy_core`].

pub mod admin;
pub mod control;
pub mod kernel;
pub mod logging;
