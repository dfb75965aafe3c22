//! What threads that carry payload run on, in the broker and in the publisher.
//!
//! [`poller`] and [`sleep`] wait, [`deadline`] limits how long a peer may take, [`address`] resolves
//! names, [`profile`] measures stages and publishes figures of a running thread, and [`poison`] takes
//! locks that survive a panic.

pub mod address;
pub mod deadline;
pub mod poison;
pub mod poller;
pub mod profile;
pub mod sleep;
