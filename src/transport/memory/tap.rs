//! A look at every message that passes through a memory broker: for demonstrations and tests.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::transport::{Destination, PublishRequest};

/// One message that passed.
#[derive(Clone, Debug)]
pub struct PublishedMessage {
    /// Where it was sent.
    pub destination: Destination,
    /// The message, byte for byte.
    pub body: Arc<[u8]>,
    /// The format that it claims.
    pub content_type: String,
}

/// What has passed since this tap was made or last read. Holds a bounded number of messages: the oldest are dropped and counted.
#[derive(Debug)]
pub struct Tap(Arc<Mutex<Ring>>);

#[derive(Debug)]
struct Ring {
    passed: VecDeque<PublishedMessage>,
    capacity: usize,
    missed: u64,
}

impl Tap {
    /// Takes what has passed, oldest first.
    pub fn take(&self) -> Vec<PublishedMessage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).passed.drain(..).collect()
    }

    /// How many messages were dropped because nobody took them in time.
    pub fn missed(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).missed
    }
}

/// The taps of one broker.
#[derive(Debug, Default)]
pub(super) struct Taps(Vec<Weak<Mutex<Ring>>>);

impl Taps {
    pub(super) fn add(&mut self, capacity: usize) -> Tap {
        let ring = Arc::new(Mutex::new(Ring { passed: VecDeque::new(), capacity: capacity.max(1), missed: 0 }));
        self.0.retain(|tap| tap.strong_count() > 0);
        self.0.push(Arc::downgrade(&ring));
        Tap(ring)
    }

    pub(super) fn record(&self, message: &PublishRequest) {
        for ring in self.0.iter().filter_map(Weak::upgrade) {
            let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
            if ring.passed.len() >= ring.capacity {
                ring.passed.pop_front();
                ring.missed += 1;
            }
            ring.passed.push_back(PublishedMessage {
                destination: message.destination.clone(),
                body: Arc::clone(&message.body),
                content_type: message.content_type.clone(),
            });
        }
    }
}
