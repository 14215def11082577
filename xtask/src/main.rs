//! `cargo xtask`: builds, demo, tests, benchmarks, profiles, clusters, images, lint and clean-up of this workspace.
//!
//! One module per subcommand, each with `Options` and `run`. A subcommand looks first for what it needs, installs it
//! where it may (root on Debian) or says what to install, and runs again in seconds when nothing changed. It never
//! changes the Rust toolchain in PATH, and writes only below `target/`. Tested by the tests beside each module, and by
//! `.ci/run`, which uses nothing else.

mod bench;
mod build_ebpf;
mod clean;
mod clients;
mod cluster;
mod command;
mod crds;
mod demo;
mod dist;
mod fuzz;
mod go;
mod image;
mod install_yaml;
mod lint;
mod oci;
mod profile;
mod progress;
mod setup;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::progress::Reported;
use crate::setup::Missing;

/// Builds, demo, tests, benchmarks, profiles, clusters, images, lint and clean-up of this workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 all is well; 1 something failed; 2 something has to be installed first, and the \
                          message says what.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Builds the eBPF object that mesh-agent embeds
    BuildEbpf(build_ebpf::Options),
    /// Runs the unit, direct and lab tests
    Test(test::Options),
    /// Checks format, clippy, the import law and the other rules of the sources, licences and bans
    Lint(lint::Options),
    /// Runs the fuzz targets under libFuzzer, each for some seconds
    Fuzz(fuzz::Options),
    /// Runs two nodes with Bookinfo on this machine and checks what flows between them (root)
    Demo(demo::Options),
    /// Measures the mesh and its alternatives side by side on this machine (root)
    Bench(bench::Options),
    /// Builds the programs that are shipped, laid out by what they do under load (root)
    Dist(dist::Options),
    /// Draws a flame graph of the agents under the load of a benchmark (root)
    Profile(profile::Options),
    /// Runs a Kubernetes cluster of several nodes on this machine (root)
    Cluster(cluster::Options),
    /// Builds the image of mesh-agent and meshctl as an OCI archive, without a container daemon
    Image(image::Options),
    /// Makes the resource definitions of the chart from the types, and renders it
    Crds(crds::Options),
    /// Renders the chart as plain YAML: deploy/install.yaml
    InstallYaml(install_yaml::Options),
    /// Removes what tests, demos and benchmarks may have left on this machine
    Clean(clean::Options),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::BuildEbpf(options) => build_ebpf::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Lint(options) => lint::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Dist(options) => dist::run(&options),
        Command::Profile(options) => profile::run(&options),
        Command::Cluster(options) => cluster::run(&options),
        Command::Image(options) => image::run(&options),
        Command::Crds(options) => crds::run(&options),
        Command::InstallYaml(options) => install_yaml::run(&options),
        Command::Clean(options) => clean::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.is::<Reported>() {
                eprintln!("\nerror: {error:#}");
            }
            ExitCode::from(if error.is::<Missing>() { 2 } else { 1 })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
