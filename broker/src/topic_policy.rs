//! Which topics publishers may create by publishing to them.

use clap::ValueEnum;
use penstock_auth::TopicPattern;
use penstock_ingest::session::admission::{Refused, StreamRequest};
use penstock_wire::handshake::Refusal;

/// Who may create a topic by publishing to it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Creators {
    /// No publisher: the only topics are those of --topic and those whose logs already exist.
    Never,
    /// Publishers on the broker's own host.
    Local,
    /// Publishers with a key.
    Keyed,
    /// Anyone who may publish.
    Any,
}

/// The rules for topics that do not exist yet.
#[derive(Debug, Clone)]
pub struct TopicPolicy {
    pub creators: Creators,
    /// Topics that publishers may create; all if there are no patterns.
    pub patterns: Vec<TopicPattern>,
}

impl TopicPolicy {
    /// Whether a publisher may create the topic that it requests.
    pub fn check(&self, asked: &StreamRequest<'_>) -> Result<(), Refused> {
        let topic = asked.topic;
        let refuse = |why: &str, flags: &str| {
            Err(Refused {
                refusal: Refusal::Topic,
                text: format!(
                    "topic {topic:?} does not exist, and {why}: start the broker with --topic {topic}, or with {flags}"
                ),
            })
        };
        let any = "--create-topics any to let every publisher create topics";
        let may = match self.creators {
            Creators::Never => {
                return refuse(
                    "publishers may not create topics (--create-topics never)",
                    any,
                );
            }
            Creators::Local => asked.is_local,
            Creators::Keyed => asked.key.is_some(),
            Creators::Any => true,
        };
        if !may {
            let why = match self.creators {
                Creators::Local => "only publishers on the broker's own host may create topics",
                _ => "only publishers with a key may create topics",
            };
            return refuse(why, any);
        }
        let matches = |pattern: &TopicPattern| pattern.matches(topic);
        if !self.patterns.is_empty() && !self.patterns.iter().any(matches) {
            return refuse(
                "its name matches no pattern of --topics",
                "a --topics pattern that matches it",
            );
        }
        Ok(())
    }
}
