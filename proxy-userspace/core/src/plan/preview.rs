//! The table a plan leads to on a machine that has none yet.

use std::collections::HashMap;

use super::Plan;
use crate::{
    config::{Engine, RouteName, Target},
    diff::Preview,
    flow::MarkLayout,
    pool::Pool,
    ruleset::{Context, Marks, fragment, passing, skeleton},
};

#[derive(Debug)]
struct InFileOrder(HashMap<RouteName, u32>);

impl Marks for InFileOrder {
    fn mark(&self, route: &RouteName) -> Option<u32> {
        self.0.get(route).copied()
    }
}

impl Plan {
    /// Routes have the ids 1, 2, 3 … in file order; a running daemon keeps the ones it gave before. Names are not
    /// resolved. `down`: backends taken for down.
    pub fn preview(&self, layout: MarkLayout, down: &[Target]) -> Preview {
        let ids = || (1u32..).zip(&self.routes);
        let mark = |id| layout.route_mark(id).unwrap_or_default();
        let marks = InFileOrder(ids().map(|(id, plan)| (plan.route.name.clone(), mark(id))).collect());
        let mut fragments = Vec::new();
        for (id, plan) in ids() {
            match plan.engine {
                Some(Engine::Nft) => {}
                Some(_) if self.uses_nft() => {
                    fragments.push(passing(plan));
                    continue;
                }
                Some(_) | None => continue,
            }
            let mut pool = Pool::new(&plan.route);
            for target in down {
                pool.set_admin(&target.to_string(), crate::view::BackendAdmin::Down);
            }
            let context = Context {
                mark: layout,
                own: mark(id),
                marks: &marks,
                endpoints: &pool.endpoints(),
                counts_no_backend: false,
            };
            fragments.push(fragment(plan, context));
        }
        Preview { skeleton: skeleton(layout), fragments }
    }
}
