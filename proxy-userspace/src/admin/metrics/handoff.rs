//! Numbers of the engine `handoff`.

use std::{fmt, sync::atomic::Ordering::Relaxed};

use prometheus_client::{encoding::DescriptorEncoder, metrics::MetricType};

use super::{Labels, Measured, counter, single_gauge};
use crate::stream::handed::Gauge;

/// Per route; nothing where no connection was ever to be handed over.
pub(super) fn attempts(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    if measured.iter().all(|one| one.handovers.is_empty()) {
        return Ok(());
    }
    let help = "Connections handed over to the packet level (done), and attempts that came to nothing, by why.";
    let mut metric = encoder.encode_descriptor("shunt_handovers", help, None, MetricType::Counter)?;
    for one in measured {
        for (result, count) in &one.handovers {
            let labels: Labels<2> = [("route", &one.name), ("result", result)];
            counter(metric.encode_family(&labels)?, *count)?;
        }
    }
    Ok(())
}

/// Nothing where nothing can be handed over.
pub(super) fn table(encoder: &mut DescriptorEncoder, gauge: &Gauge) -> fmt::Result {
    let max = gauge.max.load(Relaxed);
    if max == 0 {
        return Ok(());
    }
    let help = "Taken places in the table of handed-over connections; ended ones linger for ten seconds.";
    single_gauge(encoder, "shunt_handover_entries", help, gauge.used.load(Relaxed))?;
    single_gauge(encoder, "shunt_handover_entries_max", "Connections that can be handed over at once.", max)
}
