//! The result as an SVG: one panel per row, one bar per path.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::{DrawingArea, IntoDrawingArea, PathElement, Rectangle, SVGBackend, Text},
    style::{Color, IntoFont, RGBColor, ShapeStyle, WHITE},
};

use super::{
    paths::PathKind,
    report::{Report, Row, number_text},
};

const PANEL: (u32, u32) = (420, 190);
const COLUMNS: usize = 3;
/// plotters' sizes; the SVG's are a quarter smaller.
const TITLE: i32 = 17;
const TEXT: i32 = 16;
/// Height of the line below the panels.
const FOOT: u32 = 34;
const INK: RGBColor = RGBColor(40, 44, 52);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Writes the plot of the rows that have ratios.
pub fn write(report: &Report, file: &Path) -> Result<()> {
    let rows: Vec<&Row> = report.rows.iter().filter(|row| row.metric.has_ratio()).collect();
    let lines = rows.len().div_ceil(COLUMNS).max(1);
    let height = PANEL.1 * lines as u32;
    let root = SVGBackend::new(file, (PANEL.0 * COLUMNS as u32, height + FOOT)).into_drawing_area();
    let machine = &report.machine;
    let foot = format!(
        "Median of {} rounds of {} s, line: smallest to largest. Linux {}, {} × {}. Client, gateway and backend on one machine.",
        report.rounds, report.seconds, machine.kernel, machine.processors, machine.processor
    );
    draw(&root, height, &rows, lines, &foot).map_err(|error| anyhow!("plot {}: {error}", file.display()))
}

fn draw(
    root: &Area<'_>,
    height: u32,
    rows: &[&Row],
    lines: usize,
    foot: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    root.fill(&WHITE)?;
    let (panels, below) = root.split_vertically(height);
    below.draw(&Text::new(foot, (12, 8), ("sans-serif", TEXT).into_font().color(&INK)))?;
    for (panel, row) in panels.split_evenly((lines, COLUMNS)).iter().zip(rows) {
        draw_panel(panel, row)?;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(panel: &Area<'_>, row: &Row) -> Result<(), Box<dyn std::error::Error>> {
    const LEFT: i32 = 112;
    const BAR: i32 = 20;
    const STEP: i32 = 28;
    let better = if row.more_is_better { "more is better" } else { "less is better" };
    let title = format!("{} [{}, {better}]", row.title, row.unit);
    panel.draw(&Text::new(title, (12, 10), ("sans-serif", TITLE).into_font().color(&INK)))?;

    let longest = row.paths.values().map(|cell| cell.value.max).fold(f64::MIN_POSITIVE, f64::max);
    // Room for the number behind the longest bar.
    let width = f64::from(PANEL.0) - f64::from(LEFT) - 80.0;
    let x = |value: f64| LEFT + (width * value / longest) as i32;
    for (line, (path, cell)) in (0..).zip(&row.paths) {
        let top = 36 + line * STEP;
        let middle = top + BAR / 2;
        panel.draw(&Text::new(path.title(), (12, top + 3), ("sans-serif", TEXT).into_font().color(&INK)))?;
        let colour = ShapeStyle::from(&colour(*path)).filled();
        panel.draw(&Rectangle::new([(LEFT, top), (x(cell.value.median), top + BAR)], colour))?;
        let whisker = vec![(x(cell.value.min), middle), (x(cell.value.max), middle)];
        panel.draw(&PathElement::new(whisker, INK.stroke_width(2)))?;
        let at = (x(cell.value.max) + 6, top + 3);
        panel.draw(&Text::new(number_text(cell.value.median), at, ("sans-serif", TEXT).into_font().color(&INK)))?;
    }
    Ok(())
}

/// Distinct also in greyscale: the subject is the darkest.
fn colour(path: PathKind) -> RGBColor {
    match path {
        PathKind::Plain => RGBColor(205, 210, 218),
        PathKind::Rule => RGBColor(150, 170, 195),
        PathKind::RuleCounted => RGBColor(115, 140, 170),
        PathKind::RuleLogged => RGBColor(80, 110, 150),
        PathKind::Shunt => RGBColor(20, 90, 160),
        PathKind::Copy => RGBColor(70, 140, 200),
        PathKind::Splice => RGBColor(110, 170, 220),
        PathKind::Sockmap => RGBColor(70, 130, 200),
        PathKind::Handoff => RGBColor(10, 60, 110),
        PathKind::HaproxyCopy => RGBColor(245, 200, 140),
        PathKind::Haproxy => RGBColor(235, 165, 90),
        PathKind::Nginx => RGBColor(120, 175, 110),
    }
}
