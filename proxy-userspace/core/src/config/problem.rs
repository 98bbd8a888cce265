//! What is wrong with a file, one line each.

use std::{fmt, path::PathBuf};

use serde::Serialize;

/// Everything that is wrong with a configuration file, in the order of the file. Never empty.
///
/// Its `Display` is one line per problem: `/etc/shunt/shunt.toml:12: route "web": listen[1]: port 0 is not a port (1–65535)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problems {
    pub file: PathBuf,
    pub problems: Vec<Problem>,
}

/// One thing that is wrong. Its `Display` lacks the file, which is [`Problems::file`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// 1 is the first.
    pub line: usize,
    /// In characters; 1 is the first.
    pub column: usize,
    /// Which key of which route or section: `route "web": listen[1]`, `admin.socket`. Empty for a mistake in the
    /// TOML itself.
    pub key: String,
    /// The bad value and what is allowed; one line.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.line)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}:{problem}", self.file.display())?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
