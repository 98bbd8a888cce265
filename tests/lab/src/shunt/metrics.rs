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

    /// How many observations of the histogram `name` were `most` or less, `most` being one of its bounds. `None` without
    /// such a histogram, or bound.
    pub fn observed(&self, name: &str, labels: &[(&str, &str)], most: f64) -> Option<f64> {
        let carries = |sample: &&Sample| {
            sample.metric == name && labels.iter().all(|(key, value)| sample.labels.get(key) == Some(value))
        };
        self.0.iter().filter(carries).find_map(|sample| match &sample.value {
            Value::Histogram(buckets) => buckets.iter().find(|b| b.less_than == most).map(|bucket| bucket.count),
            Value::Counter(_) | Value::Gauge(_) | Value::Untyped(_) | Value::Summary(_) => None,
        })
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
        # TYPE shunt_connect_seconds histogram\n\
        shunt_connect_seconds_sum{route=\"db\"} 1.5\n\
        shunt_connect_seconds_count{route=\"db\"} 2\n\
        shunt_connect_seconds_bucket{le=\"0.2\",route=\"db\"} 1\n\
        shunt_connect_seconds_bucket{le=\"+Inf\",route=\"db\"} 2\n\
        # EOF\n";

    #[test]
    fn samples_are_summed_over_the_labels_not_asked_for() -> Result<()> {
        let metrics = Metrics::parse(PAGE)?;
        assert_eq!(metrics.get("shunt_bytes_total", &[("route", "web")]), Some(37.0));
        assert_eq!(metrics.get("shunt_bytes_total", &[("route", "web"), ("direction", "in")]), Some(7.0));
        assert_eq!(metrics.get("shunt_bytes_total", &[("route", "none")]), None);
        Ok(())
    }

    #[test]
    fn a_histogram_tells_how_many_were_at_most_a_bound() -> Result<()> {
        let metrics = Metrics::parse(PAGE)?;
        let observed = |most| metrics.observed("shunt_connect_seconds", &[("route", "db")], most);
        assert_eq!((observed(0.2), observed(f64::INFINITY), observed(3.0)), (Some(1.0), Some(2.0), None));
        assert_eq!(metrics.get("shunt_connect_seconds_sum", &[("route", "db")]), Some(1.5));
        assert_eq!(metrics.observed("shunt_connect_seconds", &[("route", "web")], 0.2), None);
        Ok(())
    }
}
