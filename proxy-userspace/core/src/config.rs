//! The configuration file: text in, [`Config`] out, or every problem at once.

mod types;

pub use types::*;
