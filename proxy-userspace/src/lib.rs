//! The shunt daemon: a thin shell of kernel calls around [`proxy_core`].

pub mod access_log;
pub mod admin;
pub mod app;
pub mod control;
pub mod health;
pub mod kernel;
pub mod logging;
pub mod reconcile;
pub mod resolve;
pub mod track;
