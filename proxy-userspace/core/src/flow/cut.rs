//! Ending flows on purpose.
//!
//! A cut is counted at once; the caller marks the returned entries [`super::End::Cut`] in the kernel and deletes them a
//! moment later.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use super::{
    record::{EntryKey, FlowId, Now, Record},
    table::{FlowTable, close, report, touch},
    timers::deadline,
};
use crate::{config::Protocol, reason::Reason};

impl FlowTable {
    /// Ends one active flow. `None`: no such flow, or it has ended already.
    pub fn cut(&mut self, id: FlowId, reason: Reason, now: Now) -> Option<EntryKey> {
        let record = self.flows.get_mut(&id).filter(|record| record.state.is_active())?;
        let tally = self.tallies.get_mut(&record.route)?;
        close(record, tally, reason, now);
        touch(tally, record.route, &mut self.changed);
        Some(record.key())
    }

    /// Ends the flows whose time has come: lifetimes, idle limits the kernel does not know, drain deadlines.
    pub fn expire(&mut self, now: Now) -> Vec<EntryKey> {
        let mut cuts = Vec::new();
        while let Some(id) = self.timers.pop(now) {
            let Some(record) = self.flows.get(&id) else { continue };
            let Some(tally) = self.tallies.get(&record.route) else { continue };
            if let Some((_, reason)) = deadline(record, &tally.info).filter(|(at, _)| *at <= now.mono) {
                cuts.extend(self.cut(id, reason, now));
            }
        }
        let due: HashSet<u32> = self.draining().filter(|(_, until, _)| *until <= now.mono).map(|(id, ..)| id).collect();
        if !due.is_empty() {
            cuts.extend(self.cut_where(Reason::Drained, now, |record| due.contains(&record.route)));
        }
        cuts
    }

    /// When [`FlowTable::expire`] has something to do next.
    pub fn next_expiry(&self) -> Option<Duration> {
        let drain = self.draining().filter(|(_, _, active)| *active > 0).map(|(_, until, _)| until).min();
        [self.timers.next(), drain].into_iter().flatten().min()
    }

    /// Draining routes without an active flow.
    pub fn drained(&self) -> Vec<u32> {
        self.draining().filter(|(_, _, active)| *active == 0).map(|(id, ..)| id).collect()
    }

    /// Reports every ended connection as it is known now.
    pub fn report_all(&mut self, now: Now) {
        for record in self.flows.values_mut().filter(|record| !record.state.is_active()) {
            if let Some(tally) = self.tallies.get_mut(&record.route) {
                report(record, tally, now, &mut self.ended);
            }
        }
    }

    fn draining(&self) -> impl Iterator<Item = (u32, Duration, u64)> {
        self.draining.iter().filter_map(|id| {
            let tally = self.tallies.get(id)?;
            Some((*id, tally.info.drain_until?, tally.active))
        })
    }

    /// Ends the UDP flows of one backend, so that the next datagram chooses another. `port` is `None` where the backend
    /// keeps the port the client dialled.
    pub fn drop_udp(&mut self, route: u32, backend: (IpAddr, Option<u16>), now: Now) -> Vec<EntryKey> {
        let (ip, port) = backend;
        self.cut_where(Reason::Drained, now, |record| {
            record.route == route
                && record.protocol == Protocol::Udp
                && record.backend.ip() == ip
                && port.is_none_or(|port| record.backend.port() == port)
        })
    }

    fn cut_where(&mut self, reason: Reason, now: Now, choose: impl Fn(&Record) -> bool) -> Vec<EntryKey> {
        let ids: Vec<FlowId> = self
            .flows
            .values()
            .filter(|record| record.state.is_active() && choose(record))
            .map(|record| record.id)
            .collect();
        ids.into_iter().filter_map(|id| self.cut(id, reason, now)).collect()
    }
}
