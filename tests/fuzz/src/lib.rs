//! What must hold for any bytes: one module per target, each a function that panics where it does not hold.
//!
//! `cargo xtask fuzz` runs them under libFuzzer. Without it they are ordinary functions, and the tests below run them
//! over the seeds: a crashing input that is put among the seeds stays fixed.

pub mod config;
pub mod detection;
pub mod http1_edge;
pub mod identity;
pub mod jwt;
pub mod path;

#[cfg(test)]
mod tests {
    use std::{fs, io, path::Path};

    fn seeds(target: &str, run: fn(&[u8])) -> io::Result<()> {
        let mut seen = 0;
        for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target))? {
            run(&fs::read(entry?.path())?);
            seen += 1;
        }
        assert!(seen > 0, "no seeds for {target}");
        Ok(())
    }

    #[test]
    fn detection() -> io::Result<()> {
        seeds("detection", super::detection::run)
    }

    #[test]
    fn http1_edge() -> io::Result<()> {
        seeds("http1_edge", super::http1_edge::run)
    }

    #[test]
    fn jwt() -> io::Result<()> {
        seeds("jwt", super::jwt::run)
    }

    #[test]
    fn path() -> io::Result<()> {
        seeds("path", super::path::run)
    }

    #[test]
    fn identity() -> io::Result<()> {
        seeds("identity", super::identity::run)
    }

    #[test]
    fn config() -> io::Result<()> {
        seeds("config", super::config::run)
    }
}
