//! Which topics publishers may make by publishing to them.

use clap::ValueEnum;
use penstock_dataplane::admission::{Asked, Refused};
use penstock_dataplane::auth::TopicPattern;
use penstock_dataplane::wire::handshake::Refusal;

/// Who may make a topic by a first publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Creators {
    /// Nobody: there are the topics of --topic, and those whose logs are there already.
    Never,
    /// Publishers on the broker's own host.
    Local,
    /// Holders of a key.
    Keyed,
    /// Everybody who may publish.
    Any,
}

/// The rules for topics that are not there yet.
#[derive(Debug, Clone)]
pub struct TopicPolicy {
    pub creators: Creators,
    /// Topics that may be made; all of them if there are no patterns.
    pub patterns: Vec<TopicPattern>,
}

impl TopicPolicy {
    /// Whether a publisher may make the topic that it asks for.
    pub fn check(&self, asked: &Asked<'_>) -> Result<(), Refused> {
        let topic = asked.topic;
        let refuse = |why: &str, flags: &str| {
            Err(Refused {
                refusal: Refusal::Topic,
                text: format!(
                    "there is no topic {topic:?} here, and {why}: start the broker with --topic {topic}, or with {flags}"
                ),
            })
        };
        let any = "--create-topics any to let everybody who may publish make topics";
        let may = match self.creators {
            Creators::Never => {
                return refuse("publishers may make none (--create-topics never)", any);
            }
            Creators::Local => asked.is_local,
            Creators::Keyed => asked.key.is_some(),
            Creators::Any => true,
        };
        if !may {
            let why = match self.creators {
                Creators::Local => "only publishers on the broker's own host may make one",
                _ => "only publishers with a key may make one",
            };
            return refuse(why, any);
        }
        let matches = |pattern: &TopicPattern| pattern.matches(topic);
        if !self.patterns.is_empty() && !self.patterns.iter().any(matches) {
            return refuse(
                "it is none of those that publishers may make (--topics)",
                "a pattern in --topics that it matches",
            );
        }
        Ok(())
    }
}
