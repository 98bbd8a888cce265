//! What the first bytes of a connection say: a PROXY header ([`proxy`]), a TLS ClientHello ([`hello`]).
//!
//! Both parsers are given everything received so far and say one of three things: more bytes are needed, this is it,
//! or it can no longer become one. The last as early as possible: a peer that speaks another protocol is not waited
//! for. What a prefix is refused for, every continuation is refused for, and the other way round a prefix of
//! something valid only ever needs more; so how the network cuts the bytes makes no difference.

mod cursor;
pub mod hello;
pub mod proxy;
