//! Which route has which mark. A route keeps its id as long as it, or one of its connections, lives.

use std::collections::HashMap;

use proxy_core::{config::RouteName, flow::MarkLayout, ruleset::Marks};

#[derive(Debug)]
pub struct Ids {
    layout: MarkLayout,
    by_name: HashMap<RouteName, u32>,
    by_id: HashMap<u32, RouteName>,
    /// Ids below this one are in use, or were.
    next: u32,
}

/// More routes than the bits of the mark can number.
#[derive(Debug, thiserror::Error)]
#[error("kernel.mark_mask has too few bits for {0} routes: give it more, 3 of them are for how a connection ended")]
pub struct TooManyRoutes(usize);

impl Ids {
    pub fn new(layout: MarkLayout) -> Self {
        Self { layout, by_name: HashMap::new(), by_id: HashMap::new(), next: 1 }
    }

    pub fn layout(&self) -> MarkLayout {
        self.layout
    }

    /// Takes an id over that the kernel knows already. False when it is taken.
    pub fn adopt(&mut self, name: &RouteName, id: u32) -> bool {
        if self.by_id.contains_key(&id) || self.by_name.contains_key(name) {
            return false;
        }
        self.by_name.insert(name.clone(), id);
        self.by_id.insert(id, name.clone());
        true
    }

    /// The id of `name`, a new one when it has none.
    pub fn obtain(&mut self, name: &RouteName) -> Result<u32, TooManyRoutes> {
        if let Some(&id) = self.by_name.get(name) {
            return Ok(id);
        }
        let fits = |id: &u32| self.layout.route_mark(*id).is_some();
        let free = |id: &u32| !self.by_id.contains_key(id);
        let id = (self.next..).take_while(fits).find(free).or_else(|| (1..self.next).find(free));
        let id = id.filter(fits).ok_or(TooManyRoutes(self.by_id.len() + 1))?;
        self.next = id + 1;
        self.by_name.insert(name.clone(), id);
        self.by_id.insert(id, name.clone());
        Ok(id)
    }

    pub fn release(&mut self, id: u32) {
        if let Some(name) = self.by_id.remove(&id) {
            self.by_name.remove(&name);
        }
    }

    pub fn name(&self, id: u32) -> Option<&RouteName> {
        self.by_id.get(&id)
    }

    pub fn id(&self, name: &RouteName) -> Option<u32> {
        self.by_name.get(name).copied()
    }
}

impl Marks for Ids {
    fn mark(&self, route: &RouteName) -> Option<u32> {
        self.layout.route_mark(self.id(route)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proxy_core::config::MarkMask;

    fn name(n: usize) -> RouteName {
        RouteName::new(&format!("r{n}")).expect("valid")
    }

    #[test]
    fn an_id_is_not_given_twice_and_is_free_again_after_release() {
        // Eight bits, three of them for the end: ids 1–31.
        let mask = MarkMask::new(0xff00).expect("valid");
        let mut ids = Ids::new(MarkLayout::new(mask));
        assert!(ids.adopt(&name(100), 2));
        let given: Vec<u32> = (0..30).map(|n| ids.obtain(&name(n)).expect("fits")).collect();
        assert_eq!(given, (1..=31).filter(|&id| id != 2).collect::<Vec<_>>());
        assert!(ids.obtain(&name(30)).is_err());
        ids.release(7);
        assert_eq!(ids.obtain(&name(31)).expect("freed"), 7);
        assert_eq!(ids.obtain(&name(100)).expect("adopted"), 2);
    }
}
