//! The network-namespace lab: a client, a gateway and backends on the real kernel, with real programs.
//!
//! ```text
//!   client ──── 10.88.1.0/24 ──── gateway ──── 10.88.2.2 backend1
//!   .2 (.3 …)   fd88:1::/64    .1        .1 ── 10.88.2.3 backend2 …
//! ```
//!
//! Everything a [`Lab`] makes lives in network namespaces of its own, named `shunt-<pid>-<n>-<host>`, and goes when it
//! is dropped, also in a panic. What a killed run left behind is removed when the next lab starts. Nothing outside
//! these namespaces is touched. Needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN).
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use shunt_lab::{Lab, Shunt};
//! let lab = Lab::new()?;
//! let web = lab.nginx(lab.backend(1), 80, &[("hello.txt", b"hello".to_vec())])?;
//! let shunt = Shunt::start(&lab, r#"
//!     [[route]]
//!     name = "web"
//!     listen = ["10.88.1.1:8080"]
//!     backends = ["10.88.2.2:80"]
//! "#)?;
//! assert_eq!(lab.client().curl("http://10.88.1.1:8080/hello.txt")?, b"hello");
//! assert_eq!(shunt.cli_json(&["status"])?["connections_total"], 1);
//! # Ok(()) }
//! ```

mod acme;
pub mod cable;
pub mod capture;
pub mod dialog;
mod dice;
pub mod frame;
pub mod hello;
mod host;
pub mod kernel;
mod leftovers;
pub mod link;
pub mod load;
pub mod pattern;
mod pins;
pub mod pki;
mod process;
mod programs;
pub mod proxy_header;
#[cfg(feature = "tls")]
pub mod relay;
pub mod scripted;
mod servers;
mod shunt;
pub mod stream;
mod talk;
#[cfg(feature = "tls")]
pub mod tls;
mod topology;
mod wait;
pub mod wire;

pub use acme::{AcmeCa, AcmeOptions, from_base64url};
pub use dice::Dice;
pub use host::Host;
pub use pins::Pins;
pub use process::{Running, run};
pub use programs::Certificate;
pub use servers::HttpFiles;
pub use shunt::{Metrics, Shunt, ShuntBuilder, shunt_binary, web};
pub use stream::Stream;
pub use talk::Talk;
pub use topology::{BACKEND_SIDE, BACKEND_SIDE6, CLIENT, CLIENT6, GATEWAY, GATEWAY6, Lab, LabBuilder};
pub use wait::{patiently, wait_for, wait_until};
