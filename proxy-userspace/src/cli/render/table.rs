//! Aligned columns.

use anstyle::Style;

use super::DIM;

#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    title: &'static str,
    right: bool,
}

impl Column {
    pub(super) const fn left(title: &'static str) -> Self {
        Self { title, right: false }
    }

    pub(super) const fn right(title: &'static str) -> Self {
        Self { title, right: true }
    }
}

#[derive(Debug)]
pub(super) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    pub(super) fn styled(text: impl Into<String>, style: Style) -> Self {
        Self { text: text.into(), style }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::styled(text, Style::new())
    }
}

#[derive(Debug)]
pub(super) struct Table<const N: usize> {
    columns: [Column; N],
    rows: Vec<[Cell; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(columns: &[Column; N]) -> Self {
        Self { columns: *columns, rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: [Cell; N]) {
        self.rows.push(cells);
    }

    pub(super) fn render(&self) -> String {
        let titles = self.columns.map(|column| Cell::styled(column.title, DIM));
        let widths: [usize; N] = std::array::from_fn(|index| {
            let cells = self.rows.iter().chain([&titles]).filter_map(|row| row.get(index));
            cells.map(|cell| cell.text.chars().count()).max().unwrap_or(0)
        });
        let mut text = String::new();
        for row in std::iter::once(&titles).chain(&self.rows) {
            for (index, ((cell, column), width)) in row.iter().zip(&self.columns).zip(widths).enumerate() {
                let gap = if index == 0 { "" } else { "  " };
                let padding = " ".repeat(width - cell.text.chars().count().min(width));
                let Cell { text: shown, style } = cell;
                // Nothing after the last word of a line.
                let (before, after) = match (column.right, index + 1 == N) {
                    (true, _) => (padding.as_str(), ""),
                    (false, false) => ("", padding.as_str()),
                    (false, true) => ("", ""),
                };
                text.push_str(&format!("{gap}{before}{style}{shown}{style:#}{after}"));
            }
            // An empty last cell leaves the gap before it.
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        }
        text
    }
}
