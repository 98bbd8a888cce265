//! Smooth weighted round-robin, and fixed homes for hashed clients.

/// Fills `slots` slots with indices into `weights`, in the order of smooth weighted round-robin (as nginx does it): a
/// backend of weight 2 beside one of weight 1 gives `a b a`, never `a a b`. A weight of 0 takes no slot. Empty when
/// every weight is 0.
pub fn round_robin(weights: &[u16], slots: u32) -> Vec<usize> {
    let total: i64 = weights.iter().map(|&w| i64::from(w)).sum();
    if total == 0 {
        return Vec::new();
    }
    let mut current = vec![0i64; weights.len()];
    (0..slots)
        .map(|_| {
            let mut best = None;
            for (index, &weight) in weights.iter().enumerate().filter(|&(_, &w)| w > 0) {
                current[index] += i64::from(weight);
                if best.is_none_or(|b: usize| current[index] > current[b]) {
                    best = Some(index);
                }
            }
            let best = best.unwrap_or_default();
            current[best] -= total;
            best
        })
        .collect()
}

/// Like [`round_robin`] over all of `weights`, but a slot whose home is not `up` goes to one that is. Only the clients of a
/// backend that is down move, and they spread over the others by their weight. Empty when none is up.
pub fn homes(weights: &[u16], up: &[bool], slots: u32) -> Vec<usize> {
    let spare: Vec<u16> = weights.iter().zip(up).map(|(&w, &up)| if up { w } else { 0 }).collect();
    let home = round_robin(weights, slots);
    let away = home.iter().filter(|&&h| !up[h]).count() as u32;
    let mut substitutes = round_robin(&spare, away).into_iter();
    home.into_iter().map_while(|h| if up[h] { Some(h) } else { substitutes.next() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn share(table: &[usize], index: usize) -> usize {
        table.iter().filter(|&&i| i == index).count()
    }

    #[test]
    fn weights_are_interleaved_not_in_blocks() {
        assert_eq!(round_robin(&[2, 1], 6), [0, 1, 0, 0, 1, 0]);
        assert_eq!(round_robin(&[1, 1, 1], 4), [0, 1, 2, 0]);
        assert!(round_robin(&[0, 0], 4).is_empty());
    }

    #[test]
    fn only_the_clients_of_a_dead_backend_move() {
        let before = homes(&[1, 1, 2], &[true; 3], 1024);
        let after = homes(&[1, 1, 2], &[true, false, true], 1024);
        for (slot, (&b, &a)) in before.iter().zip(&after).enumerate() {
            assert!(b == a || b == 1, "slot {slot} moved from {b} to {a}");
            assert_ne!(a, 1);
        }
        assert_eq!(share(&after, 2), 512 + 171);
        assert!(homes(&[1, 1], &[false, false], 8).is_empty());
    }

    proptest! {
        #[test]
        fn shares_are_within_one_slot_of_the_weights(weights in prop::collection::vec(0u16..20, 1..12), slots in 1u32..600) {
            let table = round_robin(&weights, slots);
            let total: u32 = weights.iter().map(|&w| u32::from(w)).sum();
            prop_assert_eq!(table.len() as u32, if total == 0 { 0 } else { slots });
            for (index, &weight) in weights.iter().enumerate().filter(|_| total > 0) {
                let exact = f64::from(weight) * f64::from(slots) / f64::from(total);
                prop_assert!((share(&table, index) as f64 - exact).abs() <= weights.len() as f64);
            }
        }
    }
}
