//! The text being read, and the problems found in it so far.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use super::problem::Problem;

/// The text of a file, its lines, and the problems found in it so far.
pub(super) struct Source<'a> {
    file: &'a Path,
    text: &'a str,
    /// Offset of the first byte of each line.
    line_starts: Vec<usize>,
    /// With the offset of what they are about.
    problems: RefCell<Vec<(usize, Problem)>>,
    /// Mistakes in the TOML itself, one per line: the first is the cause of those after it.
    mistakes: RefCell<BTreeMap<usize, (usize, Problem)>>,
    broken: bool,
}

impl<'a> Source<'a> {
    /// `broken`: the text is not TOML, and what is read is a guess at what was meant.
    pub fn new(text: &'a str, file: &'a Path, broken: bool) -> Self {
        let after_newline = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        let line_starts = std::iter::once(0).chain(after_newline).collect();
        Self { file, text, line_starts, problems: RefCell::default(), mistakes: RefCell::default(), broken }
    }

    pub fn report(&self, offset: usize, key: String, message: String) {
        let (line, column) = self.position(offset);
        self.problems.borrow_mut().push((offset, Problem { line, column, key, message }));
    }

    pub fn mistake(&self, offset: usize, message: String) {
        let (line, column) = self.position(offset);
        let problem = Problem { line, column, key: String::new(), message };
        self.mistakes.borrow_mut().entry(line).or_insert((offset, problem));
    }

    /// How many problems were found so far.
    pub fn count(&self) -> usize {
        self.problems.borrow().len()
    }

    pub fn is_broken(&self) -> bool {
        self.broken
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
    /// Where the text is broken, problems in the lines of the mistakes and those without a place of their own are left
    /// out: they may be about the guess. A broken `[header]` puts every key after it into the wrong table, so then only
    /// the mistakes are told.
    pub fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.take();
        let mistakes = self.mistakes.take();
        if self.broken {
            let header = mistakes.keys().any(|line| self.line_text(*line).trim_start().starts_with('['));
            problems.retain(|(offset, problem)| !header && *offset > 0 && !mistakes.contains_key(&problem.line));
            problems.extend(mistakes.into_values());
        }
        problems.sort_by_key(|(offset, _)| *offset);
        problems.into_iter().map(|(_, problem)| problem).collect()
    }

    fn line_text(&self, line: usize) -> &str {
        self.text.get(self.line_start(line)..).and_then(|rest| rest.lines().next()).unwrap_or_default()
    }

    fn line_start(&self, line: usize) -> usize {
        line.checked_sub(1).and_then(|index| self.line_starts.get(index)).copied().unwrap_or_default()
    }

    fn position(&self, offset: usize) -> (usize, usize) {
        let line = self.line(offset);
        let before = self.text.get(self.line_start(line)..offset).unwrap_or_default();
        (line, before.chars().count() + 1)
    }
}

/// Where in the file's tree a value is; borrowed from the stack of those who read it, rendered only for a problem.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    Root,
    /// A route, by its name as written, or by its place among the routes while it has none.
    Route { name: Option<&'a str>, index: usize },
    Key { parent: &'a Place<'a>, name: &'a str },
    Index { parent: &'a Place<'a>, index: usize },
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
