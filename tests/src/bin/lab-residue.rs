//! `lab-residue check|clean`: what labs and agents left on this machine. `check` exits 1 if there is anything;
//! `clean` removes what belongs to labs whose process has ended, and exits 1 if something could not be removed.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use lab::residue;

#[derive(Debug, Parser)]
#[command(name = "lab-residue", about = "Finds and removes what labs and agents left behind")]
enum Command {
    /// Say what is there, and exit 1 if there is anything
    Check,
    /// Remove what belongs to labs whose process has ended
    Clean,
}

fn main() -> Result<ExitCode> {
    match Command::parse() {
        Command::Check => {
            let found = residue::any()?;
            for leftover in &found {
                println!("{leftover}");
            }
            Ok(ExitCode::from(u8::from(!found.is_empty())))
        }
        Command::Clean => {
            let (removed, failed) = residue::clean()?;
            for leftover in &removed {
                println!("removed: {leftover}");
            }
            for failure in &failed {
                eprintln!("not removed: {failure}");
            }
            Ok(ExitCode::from(u8::from(!failed.is_empty())))
        }
    }
}
