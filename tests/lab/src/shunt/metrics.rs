//! The metrics page, read back.

use std::io;

use anyhow::{Context, Result};
use prometheus_parse::{Sample, Scrape, Value};

/// One reading of `/metrics`.
#[derive(Debug, Clone)]
pub struct Metrics(Vec<Sample>);

impl Metrics {
    pub fn parse(page: &str) -> Result<Self> {
        let scrape =
            Scrape::parse(page.lines().map(|line| Ok::<_, io::Error>(line.to_owned()))).context("metrics page")?;
        Ok(Self(scrape.samples))
    }

    /// Sum of all samples of `name` that carry every one of `labels`; `None` without such a sample.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut values = self
            .0
            .iter()
            .filter(|sample| sample.metric == name)
            .filter(|sample| labels.iter().all(|(key, value)| sample.labels.get(key) == Some(value)))
            .filter_map(|sample| match &sample.value {
                Value::Counter(v) | Value::Gauge(v) | Value::Untyped(v) => Some(*v),
                Value::Histogram(_) | Value::Summary(_) => None,
            })
            .peekable();
        values.peek()?;
        Some(values.sum())
    }

    /// Every sample of `name`, as the page has it.
    pub fn samples(&self, name: &str) -> Vec<String> {
        let of = |sample: &&Sample| sample.metric == name;
        self.0.iter().filter(of).map(|sample| format!("{:?} {:?}", sample.labels, sample.value)).collect()
    }

    /// As [`Self::get`]; 0 without such a sample, as Prometheus treats a counter that has not begun.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.get(name, labels).unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# TYPE shunt_bytes counter\n\
        shunt_bytes_total{route=\"web\",direction=\"in\"} 7\n\
        shunt_bytes_total{route=\"web\",direction=\"out\"} 30\n\
        shunt_bytes_total{route=\"db\",direction=\"in\"} 100\n\
        # EOF\n";

    #[test]
    fn samples_are_summed_over_the_labels_not_asked_for() -> Result<()> {
        let metrics = Metrics::parse(PAGE)?;
        assert_eq!(metrics.get("shunt_bytes_total", &[("route", "web")]), Some(37.0));
        assert_eq!(metrics.get("shunt_bytes_total", &[("route", "web"), ("direction", "in")]), Some(7.0));
        assert_eq!(metrics.get("shunt_bytes_total", &[("route", "none")]), None);
        Ok(())
    }
}
