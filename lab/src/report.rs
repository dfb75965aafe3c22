//! Reports: what they hold, and how people see them.

pub mod chart;
pub mod html;
pub mod model;
pub mod result_folder;
pub mod terminal;
pub mod text;
