//! [`Conntrack`] in memory, for tests of its user.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use proxy_core::{
    conntrack::{Entry, Event},
    flow::EntryKey,
};
use tokio::sync::Notify;

use super::{Conntrack, ConntrackError, Drained, MarkFilter, Usage};

/// A kernel table that a test fills. Clones are handles to the same table.
#[derive(Debug, Clone, Default)]
pub struct TwinConntrack {
    shared: Rc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    table: RefCell<Table>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    entries: BTreeMap<u32, Entry>,
    queue: VecDeque<Event>,
    dumps: usize,
    /// `None`: the kernel's default.
    max: Option<u64>,
    deleted: usize,
    most_deleted: usize,
}

impl TwinConntrack {
    /// A connection's first packet.
    pub fn begin(&self, entry: Entry) {
        self.shared.table.borrow_mut().entries.insert(entry.id, entry.clone());
        self.push(Event::New(entry));
    }

    /// Packets pass; `tell` decides whether an `Update` comes of it.
    pub fn change(&self, id: u32, tell: bool, change: impl FnOnce(&mut Entry)) {
        let told = {
            let mut table = self.shared.table.borrow_mut();
            table.entries.get_mut(&id).map(|entry| {
                change(entry);
                entry.clone()
            })
        };
        if let Some(entry) = told.filter(|_| tell) {
            self.push(Event::Update(entry));
        }
    }

    /// The entry expires.
    pub fn destroy(&self, id: u32) {
        let gone = self.shared.table.borrow_mut().entries.remove(&id);
        if let Some(entry) = gone {
            self.push(Event::Destroy(entry));
        }
    }

    pub fn push(&self, event: Event) {
        self.shared.table.borrow_mut().queue.push_back(event);
        self.shared.changed.notify_one();
    }

    pub fn get(&self, id: u32) -> Option<Entry> {
        self.shared.table.borrow().entries.get(&id).cloned()
    }

    /// Dumps asked for so far.
    pub fn dumps(&self) -> usize {
        self.shared.table.borrow().dumps
    }

    /// Entries now.
    pub fn entries(&self) -> u64 {
        self.shared.table.borrow().entries.len() as u64
    }

    /// How many entries there is room for.
    pub fn limit(&self, max: u64) {
        self.shared.table.borrow_mut().max = Some(max);
    }

    /// The most entries deleted from one drain to the next.
    pub fn most_deleted(&self) -> usize {
        self.shared.table.borrow().most_deleted
    }

    fn find(&self, key: &EntryKey) -> Option<u32> {
        let table = self.shared.table.borrow();
        table.entries.get(&key.id).filter(|entry| EntryKey::from(*entry) == *key).map(|entry| entry.id)
    }
}

impl Conntrack for TwinConntrack {
    async fn readable(&self) -> Result<(), ConntrackError> {
        while self.shared.table.borrow().queue.is_empty() {
            self.shared.changed.notified().await;
        }
        Ok(())
    }

    fn drain(&mut self, each: &mut dyn FnMut(&Event)) -> Result<Drained, ConntrackError> {
        let queue = {
            let mut table = self.shared.table.borrow_mut();
            table.deleted = 0;
            std::mem::take(&mut table.queue)
        };
        queue.iter().for_each(each);
        Ok(Drained { more: false })
    }

    fn dump(&mut self, filter: MarkFilter, each: &mut dyn FnMut(&Entry)) -> Result<(), ConntrackError> {
        self.shared.table.borrow_mut().dumps += 1;
        let entries: Vec<Entry> = self.shared.table.borrow().entries.values().cloned().collect();
        entries.iter().filter(|entry| entry.mark & filter.mask == filter.value).for_each(each);
        Ok(())
    }

    fn set_mark(&mut self, keys: &[EntryKey], value: u32, mask: u32) -> Result<usize, ConntrackError> {
        let ids: Vec<u32> = keys.iter().filter_map(|key| self.find(key)).collect();
        for id in &ids {
            self.change(*id, false, |entry| entry.mark = entry.mark & !mask | value);
        }
        Ok(ids.len())
    }

    fn delete(&mut self, keys: &[EntryKey]) -> Result<usize, ConntrackError> {
        let ids: Vec<u32> = keys.iter().filter_map(|key| self.find(key)).collect();
        ids.iter().for_each(|id| self.destroy(*id));
        let mut table = self.shared.table.borrow_mut();
        table.deleted += ids.len();
        table.most_deleted = table.most_deleted.max(table.deleted);
        Ok(ids.len())
    }

    fn nudge(&mut self, _keys: &[EntryKey]) {}

    fn usage(&self) -> Option<Usage> {
        let table = self.shared.table.borrow();
        Some(Usage { entries: table.entries.len() as u64, max: table.max.unwrap_or(262_144) })
    }
}
