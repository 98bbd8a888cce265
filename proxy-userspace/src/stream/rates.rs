//! How fast the counters of the stream path grow.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use super::meter::{Meters, Reader};

/// Per second, over the last interval, by route id; routes at rest are left out.
pub type Rates = HashMap<u32, Rate>;

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rate {
    pub connections: f64,
    pub bytes_in: f64,
    pub bytes_out: f64,
}

/// Looks at the counters every `every` for as long as somebody wants to know.
pub async fn sample(reader: Reader, every: Duration, out: watch::Sender<Arc<Rates>>) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: HashMap<u32, [u64; 3]> = HashMap::new();
    let mut at = Instant::now();
    while !out.is_closed() {
        ticks.tick().await;
        let now: HashMap<u32, [u64; 3]> = reader.meters.all().iter().map(|m| (m.id, counted(m))).collect();
        let seconds = at.elapsed().as_secs_f64();
        at = Instant::now();
        out.send_replace(Arc::new(rates(&before, &now, seconds)));
        before = now;
    }
}

/// Connections, bytes in, bytes out.
fn counted(meters: &Meters) -> [u64; 3] {
    let engines = meters.workers.iter().flat_map(|worker| &worker.engines);
    engines.fold([0; 3], |[began, inward, outward], engine| {
        let add = |sum: u64, counter: &super::meter::Counter| sum.wrapping_add(counter.get());
        [add(began, &engine.began), add(inward, &engine.bytes_in), add(outward, &engine.bytes_out)]
    })
}

fn rates(before: &HashMap<u32, [u64; 3]>, now: &HashMap<u32, [u64; 3]>, seconds: f64) -> Rates {
    // Two samples at once say nothing about speed.
    if seconds < 0.001 {
        return Rates::new();
    }
    let rate = |(id, now): (&u32, &[u64; 3])| {
        // A route that is new has been counted from zero.
        let before = before.get(id).unwrap_or(&[0; 3]);
        let [connections, bytes_in, bytes_out] = [0, 1, 2].map(|i| now[i].saturating_sub(before[i]) as f64 / seconds);
        let rate = Rate { connections, bytes_in, bytes_out };
        (rate != Rate::default()).then_some((*id, rate))
    };
    now.iter().filter_map(rate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_what_came_by_the_time_it_took_and_rest_is_left_out() {
        let before = HashMap::from([(1, [10, 100, 1000]), (2, [5, 5, 5])]);
        let now = HashMap::from([(1, [14, 300, 1000]), (2, [5, 5, 5]), (3, [2, 0, 0])]);
        let wanted = |connections, bytes_in, bytes_out| Rate { connections, bytes_in, bytes_out };
        assert_eq!(rates(&before, &now, 2.0), Rates::from([(1, wanted(2.0, 100.0, 0.0)), (3, wanted(1.0, 0.0, 0.0))]));
        assert!(rates(&before, &now, 0.0).is_empty());
    }
}
