//! The text being read, and the problems found in it so far.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use super::{problem::Problem, syntax::Mistake};

/// The text of a file, its lines, and the problems found in it so far.
pub(super) struct Source<'a> {
    file: &'a Path,
    text: &'a str,
    /// Offset of the first byte of each line.
    line_starts: Vec<usize>,
    /// With the offset of what they are about.
    problems: RefCell<Vec<(usize, Problem)>>,
    /// In the TOML itself.
    mistakes: Vec<Mistake>,
}

impl<'a> Source<'a> {
    /// With `mistakes`, what is read is a guess at what was meant.
    pub fn new(text: &'a str, file: &'a Path, mistakes: Vec<Mistake>) -> Self {
        let after_newline = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        let line_starts = std::iter::once(0).chain(after_newline).collect();
        Self { file, text, line_starts, problems: RefCell::default(), mistakes }
    }

    pub fn report(&self, offset: usize, key: String, message: String) {
        let (line, column) = self.position(offset);
        self.problems.borrow_mut().push((offset, Problem { line, column, key, message }));
    }

    /// How many problems were found so far.
    pub fn count(&self) -> usize {
        self.problems.borrow().len()
    }

    pub fn is_broken(&self) -> bool {
        !self.mistakes.is_empty()
    }

    pub fn has_problems(&self) -> bool {
        !self.problems.borrow().is_empty()
    }

    /// The line that holds the byte at `offset`; 1 is the first.
    pub fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset)
    }

    /// `path` as seen from the folder of the file.
    pub fn resolve(&self, path: &str) -> PathBuf {
        self.file.parent().map_or_else(|| PathBuf::from(path), |folder| folder.join(path))
    }

    /// What was found, in the order of the file.
    ///
    /// Where there are mistakes in the TOML, problems that may only be about the guess are left out: those in the same
    /// lines, those after a mistake that misleads, and those without a place of their own.
    pub fn into_problems(mut self) -> Vec<Problem> {
        let mut problems = self.problems.take();
        let mut broken_lines = BTreeMap::new();
        let mut readable = usize::MAX;
        for Mistake { offset, message, misleads } in std::mem::take(&mut self.mistakes) {
            let (line, column) = self.position(offset);
            // The first mistake of a line is the cause of those after it.
            broken_lines.entry(line).or_insert((offset, Problem { line, column, key: String::new(), message }));
            if misleads {
                readable = readable.min(offset);
            }
        }
        if !broken_lines.is_empty() {
            problems.retain(|(offset, problem)| {
                (1..readable).contains(offset) && !broken_lines.contains_key(&problem.line)
            });
            problems.extend(broken_lines.into_values());
        }
        problems.sort_by_key(|(offset, _)| *offset);
        problems.into_iter().map(|(_, problem)| problem).collect()
    }

    fn position(&self, offset: usize) -> (usize, usize) {
        let line = self.line(offset);
        let start = line.checked_sub(1).and_then(|index| self.line_starts.get(index)).copied().unwrap_or_default();
        let before = self.text.get(start..offset).unwrap_or_default();
        (line, before.chars().count() + 1)
    }
}

/// Where in the file's tree a value is; borrowed from the stack of those who read it, rendered only for a problem.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    Root,
    /// A route, by its name as written, or by its place among the routes while it has none.
    Route {
        name: Option<&'a str>,
        index: usize,
    },
    Key {
        parent: &'a Place<'a>,
        name: &'a str,
    },
    Index {
        parent: &'a Place<'a>,
        index: usize,
    },
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Route { name: Some(name), .. } => write!(f, "route {}", quoted(name)),
            Self::Route { name: None, index } => write!(f, "route[{index}]"),
            Self::Key { parent, name } => match parent {
                Self::Root => write!(f, "{}", bare(name)),
                Self::Route { .. } => write!(f, "{parent}: {}", bare(name)),
                _ => write!(f, "{parent}.{}", bare(name)),
            },
            Self::Index { parent, index } => write!(f, "{parent}[{index}]"),
        }
    }
}

/// The longest a value is shown, in characters.
const SHOWN: usize = 80;

/// `text` in quotes, on one line, and not too long.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}…", text.get(..end).unwrap_or_default()),
    }
}

/// A key as it is written in TOML.
fn bare(key: &str) -> String {
    let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if plain && key.len() <= SHOWN { key.to_owned() } else { quoted(key) }
}
