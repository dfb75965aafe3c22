//! Floods of foreign, damaged and repeated packets, of handshakes and of claims: an honest publisher gets
//! everything through, each is counted, and the broker does not grow.

#[path = "hostile/claims.rs"]
mod claims;
#[path = "hostile/flood.rs"]
mod flood;
#[path = "hostile/handshakes.rs"]
mod handshakes;
#[path = "hostile/honest.rs"]
mod honest;

use std::process::ExitCode;

use penstock_e2e::{Case, run};

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(flood::cases());
    all.extend(handshakes::cases());
    all.extend(claims::cases());
    run(all.into_iter().map(Case::alone).map(Case::long))
}
