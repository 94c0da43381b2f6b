//! Turns `include/bitsandbytes.h` into a struct of functions that are looked up when the library is loaded.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=include/bitsandbytes.h");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    bindgen::Builder::default()
        .header("include/bitsandbytes.h")
        .allowlist_function("c(quantize|dequantize)_blockwise.*")
        .dynamic_library_name("BitsAndBytes")
        // The CPU library lacks the CUDA library's symbols and the other way round: each is a `Result`.
        .dynamic_link_require_all(false)
        .layout_tests(false)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .wrap_unsafe_ops(true)
        .generate()?
        .write_to_file(out.join("bindings.rs"))?;
    Ok(())
}
