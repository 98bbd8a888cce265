//! Maglev consistent hashing (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, §3.4).

/// Fills `size` slots (a prime) with indices into `backends`, given as (name, weight). The table depends on the set of names
/// and weights alone, not on their order, the machine or the process: every node from the same file has the same
/// table. Weights decide how often a backend takes its turn (as in Envoy and Cilium); 0 takes no slot.
/// Empty when no backend has a weight.
pub fn maglev(backends: &[(&str, u16)], size: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..backends.len()).filter(|&i| backends[i].1 > 0).collect();
    order.sort_by_key(|&i| backends[i].0);
    let heaviest = order.iter().map(|&i| u64::from(backends[i].1)).max().unwrap_or(0);
    if heaviest == 0 {
        return Vec::new();
    }
    let size = u64::from(size);
    let mut preferences: Vec<Preference> = order.iter().map(|&i| Preference::new(backends[i].0, size)).collect();
    let mut table = vec![usize::MAX; size as usize];
    let mut filled = 0;
    let mut round: u64 = 0;
    loop {
        round += 1;
        for (&index, preference) in order.iter().zip(&mut preferences) {
            // A backend of the heaviest weight takes a slot each round, the others in proportion.
            if round * u64::from(backends[index].1) <= preference.taken * heaviest {
                continue;
            }
            let slot = preference.next_free(&table, size);
            table[slot] = index;
            preference.taken += 1;
            filled += 1;
            if filled == size {
                return table;
            }
        }
    }
}

/// A backend's permutation of the slots, walked one step at a time.
struct Preference {
    at: u64,
    skip: u64,
    taken: u64,
}

impl Preference {
    fn new(name: &str, size: u64) -> Self {
        let skip = if size > 1 { hash(name.as_bytes(), 2) % (size - 1) + 1 } else { 1 };
        Self { at: hash(name.as_bytes(), 1) % size, skip, taken: 0 }
    }

    fn next_free(&mut self, table: &[usize], size: u64) -> usize {
        loop {
            let slot = self.at as usize;
            self.at = (self.at + self.skip) % size;
            if table[slot] == usize::MAX {
                return slot;
            }
        }
    }
}

/// FNV-1a with a SplitMix64 finish: fixed for ever, as the table must be the same on every node and version.
pub fn hash(name: &[u8], seed: u64) -> u64 {
    let fnv = name.iter().fold(0xcbf2_9ce4_8422_2325 ^ seed, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (fnv ^ (fnv >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("10.0.0.{i}:80")).collect()
    }

    fn table(names: &[String], size: u32) -> Vec<usize> {
        maglev(&names.iter().map(|n| (n.as_str(), 1)).collect::<Vec<_>>(), size)
    }

    #[test]
    fn shares_differ_by_less_than_one_in_a_hundred() {
        let table = table(&names(10), 1021);
        for backend in 0..10 {
            let share = table.iter().filter(|&&b| b == backend).count();
            assert!((101..=103).contains(&share), "backend {backend} has {share} of 1021");
        }
    }

    #[test]
    fn few_clients_of_the_others_move_when_one_of_ten_goes() {
        let names = names(10);
        let before = table(&names, 1021);
        let after = table(&names[..9], 1021);
        let needless = before.iter().zip(&after).filter(|&(&b, &a)| b != 9 && b != a).count();
        let moved = before.iter().zip(&after).filter(|&(&b, &a)| b != a).count();
        println!("moved: {moved} of 1021 slots, {needless} of them needlessly");
        assert!(needless < 80, "{needless} of 1021 slots moved although their backend stayed");
    }

    #[test]
    fn the_order_of_the_file_does_not_matter() {
        let forward = maglev(&[("a:1", 1), ("b:1", 3), ("c:1", 2)], 251);
        let backward = maglev(&[("c:1", 2), ("b:1", 3), ("a:1", 1)], 251);
        let flipped: Vec<usize> = backward.iter().map(|&i| 2 - i).collect();
        assert_eq!(forward, flipped);
    }

    #[test]
    fn the_table_never_changes_between_versions() {
        assert_eq!(maglev(&[("a:1", 1), ("b:1", 1), ("c:1", 1)], 13), [2, 2, 1, 0, 2, 0, 1, 0, 1, 0, 1, 2, 0]);
    }

    #[test]
    fn weights_are_kept() {
        let table = maglev(&[("a:1", 1), ("b:1", 3), ("c:1", 0)], 1021);
        let share = |i| table.iter().filter(|&&b| b == i).count() as f64 / 1021.0;
        assert!((share(0) - 0.25).abs() < 0.01 && (share(1) - 0.75).abs() < 0.01);
        assert!(maglev(&[("a:1", 0)], 13).is_empty());
    }
}
