//! Places for the requests of other nodes: how many one mapper works on at a time, and the share of each sender.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::packet::Identity;

/// A bounded number of places, shared fairly.
///
/// A sender gets another place while it has fewer than are free: one sender alone can have half of all, two a third each, and so on. So
/// however many places a sender asks for, some are left for the others.
#[derive(Clone, Debug)]
pub(super) struct Places(Arc<Table>);

#[derive(Debug)]
struct Table {
    total: usize,
    /// Senders with at least one place.
    taken: Mutex<HashMap<Identity, usize>>,
}

/// A place; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    table: Arc<Table>,
    sender: Identity,
}

impl Places {
    pub fn new(total: usize) -> Self {
        Self(Arc::new(Table { total, taken: Mutex::default() }))
    }

    /// A place for a sender; none if it has its share.
    pub fn take(&self, sender: &Identity) -> Option<Place> {
        let mut taken = self.0.taken.lock();
        let free = self.0.total.saturating_sub(taken.values().sum());
        let own = taken.get(sender).copied().unwrap_or(0);
        if own >= free {
            return None;
        }
        taken.insert(sender.clone(), own + 1);
        Some(Place { table: self.0.clone(), sender: sender.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.table.taken.lock();
        if let Some(own) = taken.get_mut(&self.sender) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.sender);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(places: &Places, sender: &str) -> Vec<Place> {
        let sender = Identity::agent(sender).unwrap();
        std::iter::from_fn(|| places.take(&sender)).collect()
    }

    #[test]
    fn d12_one_sender_leaves_half_of_the_places_to_others() {
        let places = Places::new(100);
        let first = fill(&places, "a");
        assert_eq!(first.len(), 50);
        let second = fill(&places, "b");
        assert_eq!(second.len(), 25);
        assert_eq!(fill(&places, "c").len(), 13, "there is room for a newcomer");
        drop((first, second));
        assert_eq!(fill(&places, "a").len(), 50, "a dropped place is free again");
        assert!(places.0.taken.lock().is_empty(), "senders without a place are forgotten");
    }

    #[test]
    fn d12_the_number_of_places_is_bounded() {
        let places = Places::new(10);
        let all: Vec<Place> = (0..100).flat_map(|n| places.take(&Identity::agent(&format!("a{n}")).unwrap())).collect();
        assert_eq!(all.len(), 10);
    }
}
