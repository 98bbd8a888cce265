//! shunt's decisions, without a single syscall.
//!
//! Text becomes a [`config::Config`]; a config and the kernel's [`capability::Capabilities`] become a
//! [`plan::Plan`]; a plan and the state of the backends become a [`ruleset::Ruleset`]; the difference to
//! what the kernel holds becomes [`diff::Changes`]. Flow records live in [`flow`]. [`sniff`] reads the first bytes of a
//! connection.
#![forbid(unsafe_code)]

pub mod balance;
pub mod capability;
pub mod classify;
pub mod config;
pub mod conntrack;
pub mod diff;
pub mod flow;
pub mod handed;
pub mod handoff;
pub mod plan;
pub mod pool;
pub mod reason;
pub mod renewal;
pub mod ruleset;
pub mod session;
pub mod sniff;
pub mod view;
pub mod wheel;
