//! Publishes that wait for their confirm.
//!
//! This is a set of futures that are polled when they were woken. Unlike the general-purpose kind it makes a promise:
//! [`InFlightPublishes::poll`] polls *every* future that was woken before the call. The publisher depends on it to know that it has seen
//! all that the broker had said at a moment.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use tokio::sync::Notify;

/// Futures with what they are for, in order of their tags.
pub(super) struct InFlightPublishes<T, O> {
    flying: BTreeMap<u64, InFlightPublish<T, O>>,
    woken: Arc<Woken>,
}

struct InFlightPublish<T, O> {
    value: T,
    future: Pin<Box<dyn Future<Output = O> + Send>>,
    waker: Waker,
    /// What the future said when it was launched, if it was ready at once.
    output: Option<O>,
}

#[derive(Default)]
struct Woken {
    tags: Mutex<Vec<u64>>,
    notify: Notify,
}

struct Tag {
    tag: u64,
    woken: Arc<Woken>,
}

impl Wake for Tag {
    fn wake(self: Arc<Self>) {
        self.woken.tags.lock().unwrap_or_else(PoisonError::into_inner).push(self.tag);
        self.woken.notify.notify_one();
    }
}

impl<T, O> InFlightPublishes<T, O> {
    pub(super) fn new() -> Self {
        Self { flying: BTreeMap::new(), woken: Arc::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.flying.len()
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.flying.values().map(|flight| &flight.value)
    }

    /// Adds a future and polls it for the first time, at once. Tags are not used twice.
    pub(super) fn launch(&mut self, tag: u64, value: T, future: impl Future<Output = O> + Send + 'static) {
        let waker = Waker::from(Arc::new(Tag { tag, woken: Arc::clone(&self.woken) }));
        // Tokio's budget would make a future that is ready say that it is not.
        let future = Box::pin(tokio::task::unconstrained(future));
        let mut flight = InFlightPublish { value, future, waker, output: None };
        if let Poll::Ready(output) = flight.future.as_mut().poll(&mut Context::from_waker(&flight.waker)) {
            flight.output = Some(output);
            flight.waker.wake_by_ref();
        }
        self.flying.insert(tag, flight);
    }

    /// Waits until some future was woken. Cancel safe.
    pub(super) fn woken(&self) -> impl Future<Output = ()> + Send + use<T, O> {
        let woken = Arc::clone(&self.woken);
        async move { woken.notify.notified().await }
    }

    /// Polls every future that was woken, and takes those that are done.
    pub(super) fn poll(&mut self) -> Vec<(u64, T, O)> {
        let tags = std::mem::take(&mut *self.woken.tags.lock().unwrap_or_else(PoisonError::into_inner));
        let mut done = Vec::new();
        for tag in tags {
            let Some(flight) = self.flying.get_mut(&tag) else { continue };
            let output = match flight.output.take() {
                Some(output) => output,
                None => match flight.future.as_mut().poll(&mut Context::from_waker(&flight.waker)) {
                    Poll::Ready(output) => output,
                    Poll::Pending => continue,
                },
            };
            if let Some(flight) = self.flying.remove(&tag) {
                done.push((tag, flight.value, output));
            }
        }
        done
    }

    /// Takes all that are not done, in order.
    pub(super) fn abandon(&mut self) -> Vec<T> {
        std::mem::take(&mut self.flying).into_values().map(|flight| flight.value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn every_woken_future_is_polled_and_no_other() {
        let mut in_flight = InFlightPublishes::new();
        let mut ends = Vec::new();
        for tag in 0..1_000 {
            let (end, wait) = oneshot::channel::<u64>();
            ends.push(end);
            in_flight.launch(tag, tag * 10, wait);
        }
        assert!(in_flight.poll().is_empty());
        for end in ends.drain(..500).rev() {
            end.send(7).unwrap();
        }
        in_flight.woken().await;
        let mut done = in_flight.poll();
        done.sort_by_key(|(tag, ..)| *tag);
        assert_eq!(done.len(), 500);
        assert!(done.iter().enumerate().all(|(n, done)| *done == (n as u64, n as u64 * 10, Ok(7))));
        assert_eq!(in_flight.abandon(), (500..1_000).map(|tag| tag * 10).collect::<Vec<_>>());
        assert_eq!(in_flight.len(), 0);
    }

    #[tokio::test]
    async fn what_is_ready_at_once_is_not_lost() {
        let mut in_flight = InFlightPublishes::new();
        in_flight.launch(1, (), std::future::ready("done"));
        in_flight.woken().await;
        assert_eq!(in_flight.poll(), [(1, (), "done")]);
    }
}
