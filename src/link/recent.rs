//! Messages that were sent a moment ago, to be sent again when a mapper that has just started asks for it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::send::Outbound;
use crate::packet::MessageId;

/// How long a message can be sent again.
const LIFETIME: Duration = Duration::from_secs(10);
/// How many messages are kept.
const MAX_MESSAGES: usize = 256;
/// How many bytes their packets may have in all, about.
const MAX_BYTES: usize = 32 << 20;

/// Messages that were sent a moment ago. Beyond its limits, the oldest are dropped.
#[derive(Debug, Default)]
pub(crate) struct RecentMessages(Mutex<VecDeque<RecentMessage>>);

/// A message that was sent.
#[derive(Debug)]
pub(crate) struct RecentMessage {
    pub id: MessageId,
    pub message: Outbound,
    /// When it was sent first.
    pub sent_at: Instant,
}

impl RecentMessages {
    /// Keeps a message.
    pub fn keep(&self, recent: RecentMessage) {
        let now = Instant::now();
        let mut kept = self.0.lock();
        kept.push_back(recent);
        let mut bytes = 0_usize;
        // From the newest to the oldest.
        let fitting = kept.iter().rev().take(MAX_MESSAGES).take_while(|recent| {
            bytes = bytes.saturating_add(recent.message.bytes());
            bytes <= MAX_BYTES && now.saturating_duration_since(recent.sent_at) < LIFETIME
        });
        let fitting = fitting.count();
        let excess = kept.len().saturating_sub(fitting);
        kept.drain(..excess);
    }

    /// Takes a message out, if it can still be sent again.
    pub fn take(&self, id: MessageId) -> Option<RecentMessage> {
        let mut kept = self.0.lock();
        let index = kept.iter().position(|recent| recent.id == id)?;
        kept.remove(index).filter(|recent| recent.sent_at.elapsed() < LIFETIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Packet, Payload, Request};
    use crate::serializer::Audience;

    fn message(id: u16, bytes: usize, age: Duration) -> RecentMessage {
        let request = Request::new("/a/b".parse().unwrap(), Payload::from("x".repeat(bytes).as_str()));
        let mut whole = [0; 16];
        whole[..2].copy_from_slice(&id.to_be_bytes());
        RecentMessage {
            id: MessageId::from_bytes(whole),
            message: Outbound::new(Packet::Push(request), Audience::Mappers),
            sent_at: Instant::now().checked_sub(age).unwrap(),
        }
    }

    fn is_kept(recent: &RecentMessages, number: u16) -> bool {
        recent.take(message(number, 0, Duration::ZERO).id).is_some()
    }

    #[test]
    fn s06_messages_to_send_again_are_bounded_in_number_bytes_and_time() {
        let recent = RecentMessages::default();
        for number in 0..=256 {
            recent.keep(message(number, 1, Duration::ZERO));
        }
        assert_eq!(recent.0.lock().len(), MAX_MESSAGES);
        assert!(!is_kept(&recent, 0) && is_kept(&recent, 1) && is_kept(&recent, 256));
        assert!(!is_kept(&recent, 1), "a message is sent again once");

        recent.keep(message(300, MAX_BYTES / 2, Duration::ZERO));
        recent.keep(message(301, MAX_BYTES / 2, Duration::ZERO));
        recent.keep(message(302, 1, Duration::ZERO));
        assert!(!is_kept(&recent, 300) && is_kept(&recent, 301) && is_kept(&recent, 302));
        recent.keep(message(303, MAX_BYTES + 1, Duration::ZERO));
        assert!(!is_kept(&recent, 303));

        recent.keep(message(304, 1, LIFETIME - Duration::from_secs(5)));
        recent.keep(message(305, 1, LIFETIME));
        assert!(!is_kept(&recent, 305));
    }
}
