//! The shunt daemon: a thin shell of kernel calls around [`proxy_core`].

pub mod admin;
pub mod cli;
pub mod control;
pub mod doctor;
pub mod kernel;
pub mod logging;
