//! The shunt daemon: a thin shell of kernel calls around [`proxy_core`].

pub mod access_log;
pub mod acme;
pub mod admin;
pub mod app;
pub mod cli;
pub mod control;
pub mod doctor;
pub mod handoff;
pub mod health;
pub mod kernel;
pub mod logging;
pub mod reconcile;
pub mod resolve;
pub mod stream;
pub mod tls;
pub mod track;
