//! From samples to medians, spreads and ratios.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{measure::Sample, metric::Metric, paths::PathKind};

/// Median and extremes over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// `None` for no values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Self { median: (low + high) / 2.0, min, max })
    }

    /// Half the distance between the extremes, in percent of the median.
    pub fn percent(&self) -> f64 {
        if self.median == 0.0 { 0.0 } else { 50.0 * (self.max - self.min) / self.median.abs() }
    }
}

/// One number of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    #[serde(flatten)]
    pub value: Spread,
    /// Of the two values of the same round, then over the rounds: what disturbs a round disturbs both.
    pub to_rule: Option<Spread>,
    pub to_plain: Option<Spread>,
    /// To the best of the other proxies in the same round.
    pub to_peer: Option<Spread>,
    /// In the order of the rounds.
    pub rounds: Vec<f64>,
}

/// All samples of a benchmark: per metric and path one value per round.
#[derive(Debug, Clone, Default)]
pub struct Samples(BTreeMap<Metric, BTreeMap<PathKind, Vec<f64>>>);

impl Samples {
    pub fn add(&mut self, path: PathKind, samples: Vec<Sample>) {
        for (metric, value) in samples {
            self.0.entry(metric).or_default().entry(path).or_default().push(value);
        }
    }

    pub fn cells(mut self) -> BTreeMap<Metric, BTreeMap<PathKind, Cell>> {
        self.subtract_the_ends();
        let cells_of = |metric: Metric, paths: &BTreeMap<PathKind, Vec<f64>>| {
            let cell = |values: &Vec<f64>| {
                let ratio = |to| {
                    let base = paths.get(&to).filter(|_| metric.has_ratio())?;
                    Spread::of(values.iter().zip(base).map(|(value, base)| value / base))
                };
                let (to_rule, to_plain) = (ratio(PathKind::Rule), ratio(PathKind::Plain));
                let best = |round: usize| {
                    let peers = PathKind::PEERS.iter().filter_map(|peer| paths.get(peer)?.get(round).copied());
                    if metric.more_is_better() { peers.reduce(f64::max) } else { peers.reduce(f64::min) }
                };
                let to_peer = values.iter().enumerate().filter_map(|(round, value)| Some(value / best(round)?));
                let to_peer = Spread::of(to_peer.filter(|_| metric != Metric::KernelPerConnection));
                let value = Spread::of(values.iter().copied())?;
                Some(Cell { value, to_rule, to_plain, to_peer, rounds: values.clone() })
            };
            paths.iter().filter_map(|(path, values)| Some((*path, cell(values)?))).collect()
        };
        self.0.iter().map(|(metric, paths)| (*metric, cells_of(*metric, paths))).collect()
    }

    /// The kernel memory of both ends is in every path's number; with plain routing it is all there is. Without that
    /// one the others say nothing.
    fn subtract_the_ends(&mut self) {
        let Some(mut paths) = self.0.remove(&Metric::KernelPerConnection) else { return };
        let Some(ends) = paths.remove(&PathKind::Plain) else { return };
        for values in paths.values_mut() {
            for (value, end) in values.iter_mut().zip(&ends) {
                *value -= end;
            }
        }
        self.0.insert(Metric::KernelPerConnection, paths);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_is_the_middle_of_two() {
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn ratios_pair_the_values_of_a_round() {
        let mut samples = Samples::default();
        for (rule, shunt) in [(10.0, 9.0), (100.0, 95.0)] {
            samples.add(PathKind::Rule, vec![(Metric::Bulk1, rule)]);
            samples.add(PathKind::Shunt, vec![(Metric::Bulk1, shunt)]);
        }
        let cells = samples.cells();
        let ratio = cells[&Metric::Bulk1][&PathKind::Shunt].to_rule.expect("ratio");
        assert_eq!((ratio.min, ratio.max), (0.9, 0.95));
    }

    #[test]
    fn the_best_proxy_of_a_round_is_the_one_to_beat() {
        let mut samples = Samples::default();
        for (copy, haproxy, nginx) in [(20.0, 10.0, 8.0), (10.0, 4.0, 5.0)] {
            samples.add(PathKind::Copy, vec![(Metric::Bulk1, copy), (Metric::RequestsP99, copy)]);
            samples.add(PathKind::Haproxy, vec![(Metric::Bulk1, haproxy), (Metric::RequestsP99, haproxy)]);
            samples.add(PathKind::Nginx, vec![(Metric::Bulk1, nginx), (Metric::RequestsP99, nginx)]);
        }
        let cells = samples.cells();
        let ratio = |metric: Metric| cells[&metric][&PathKind::Copy].to_peer.expect("ratio").median;
        assert_eq!((ratio(Metric::Bulk1), ratio(Metric::RequestsP99)), (2.0, 2.5));
    }
}
