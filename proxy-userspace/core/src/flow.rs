//! The flow table: every connection the kernel forwards for shunt, from conntrack's events and dumps.
//!
//! Pure: time comes in with every call ([`Now`]), decisions go out as values ([`Ended`], [`EntryKey`]s to cut).
//! A connection is counted as ended exactly once, at the moment its end is known; its record lingers as
//! [`State::Closing`] while conntrack keeps the entry, so that late events find it.

mod cut;
mod dump;
mod mark;
mod record;
mod route;
mod table;
mod timers;
mod verdict;

#[cfg(test)]
mod limit_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod table_tests;

pub use dump::DumpKind;
pub use mark::{End, MarkLayout};
pub use record::{Ended, EntryKey, FlowId, Now, Record, Side, State};
pub use route::{AGE_BUCKETS, AgeHistogram, RouteInfo, RouteTable, RouteTally};
pub use table::{Counts, FlowTable};
