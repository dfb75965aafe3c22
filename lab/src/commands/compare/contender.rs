//! The two sides of a comparison.

use penstock_testbed::settings::{Mode, Route, XdpMode};

/// One side of the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    Tcp,
    /// With the program in this mode; none is the remote broker's choice.
    Xdp(Option<XdpMode>),
}

impl Contender {
    pub fn name(self) -> String {
        match self {
            Self::Tcp => "tcp".to_owned(),
            Self::Xdp(None) => "xdp".to_owned(),
            Self::Xdp(Some(mode)) => format!("xdp {}", mode.name()),
        }
    }
}

impl Contender {
    pub fn mode(self) -> Mode {
        match self {
            Self::Tcp => Mode::Tcp,
            Self::Xdp(_) => Mode::Xdp,
        }
    }

    pub fn route(self, poll: &str) -> Route {
        let xdp_mode = match self {
            Self::Xdp(mode) => mode.map(|mode| mode.name().to_owned()),
            Self::Tcp => None,
        };
        Route {
            mode: self.mode(),
            tx: None,
            xdp_mode,
            poll: (self != Self::Tcp).then(|| poll.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_names_what_was_chosen() {
        let native = Contender::Xdp(Some(XdpMode::Native)).route("busy");
        assert_eq!(native.xdp_mode.as_deref(), Some("native"));
        assert_eq!(native.poll.as_deref(), Some("busy"));
        assert_eq!(Contender::Tcp.route("busy").poll, None);
    }
}
