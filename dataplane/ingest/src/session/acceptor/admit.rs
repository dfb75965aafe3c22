//! Admission of a new connection's stream: the right to publish, a permit, then the stream itself.

use std::time::Instant;

use penstock_wire::handshake::{Path, Refusal, Request};

use super::Acceptor;
use super::pending_handshake::{Admissible, AdmissibleStream};
use crate::session::admission::{Admit, Outcome, Refused};
use crate::session::permits::StreamPermit;
use crate::session::stats::Counters;

impl<A: Admit> Acceptor<A> {
    /// Opens the stream that a new connection asks for, refuses it, or lets it wait for its topic.
    pub(super) fn admit(&mut self, key: usize, topic: String, request: Request) {
        let permit = match self.permit(key, &topic, &request) {
            Ok(permit) => permit,
            Err(Refused { refusal, text }) => {
                return self.reject(key, Some(refusal), &text, &text);
            }
        };
        let stream = AdmissibleStream {
            topic,
            request,
            permit,
        };
        self.open(key, stream);
    }

    /// The cheapest check comes first: the right to publish, then the stream's state, then the limits.
    /// Nothing is created before all of them pass.
    fn permit(
        &mut self,
        key: usize,
        topic: &str,
        request: &Request,
    ) -> Result<StreamPermit, Refused> {
        let pending = &self.handshakes[key];
        if let Some(grant) = pending.handshake.grant()
            && !grant.permits(topic)
        {
            let text = format!(
                "key {} may not publish to topic {topic:?}; add the topic to the key's line in the broker's --auth-keys file",
                grant.name
            );
            return Err(Refused {
                refusal: Refusal::Permission,
                text,
            });
        }
        self.check_path(request.path)?;
        let request = pending.stream_request(topic, request);
        self.admit.check(&request)?;
        let (permit, evicts) = self.permits.acquire(request.tenant, Instant::now())?;
        if evicts {
            Counters::count(&self.shared.counters.stream_evictions);
        }
        Ok(permit)
    }

    fn check_path(&self, path: Path) -> Result<(), Refused> {
        let text = match path {
            Path::Xdp if !self.offers_datagrams() => {
                "this broker takes payload over tcp only: use --mode tcp or auto, or start it with --mode xdp"
            }
            _ => return Ok(()),
        };
        Err(Refused {
            refusal: Refusal::Path,
            text: text.to_owned(),
        })
    }

    /// Opens a stream that has a permit, unless its topic has to be opened first.
    pub(super) fn open(&mut self, key: usize, stream: AdmissibleStream) {
        let Some(pending) = self.handshakes.get(key) else {
            return;
        };
        let request = pending.stream_request(&stream.topic, &stream.request);
        match self.admit.admit(&request) {
            Ok(Outcome::Admitted(mut admission)) => {
                admission.lease = admission.lease.with_permit(stream.permit);
                self.hand_over(key, *admission);
            }
            Ok(Outcome::TopicOpening) => self.wait_for_topic(key, Admissible::Stream(stream)),
            Err(Refused { refusal, text }) => {
                self.reject(key, Some(refusal), &text, &text);
            }
        }
    }

    pub(super) fn offers_datagrams(&self) -> bool {
        let path = self.datagrams.as_ref();
        path.is_some_and(|path| !path.pending_streams.is_closed())
    }
}
