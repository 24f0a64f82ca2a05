//! Tells the code whether the model it embeds is in the tree.

fn main() {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/ds4-nano/ds4-nano.gguf");
    println!("cargo::rerun-if-changed={}", model.display());
    println!("cargo::rustc-check-cfg=cfg(embedded_model)");
    if model.exists() {
        println!("cargo::rustc-cfg=embedded_model");
    }
}
