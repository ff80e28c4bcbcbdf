//! n24: the examples that need no broker and no process of their own run.

#[path = "../../examples/custom_store.rs"]
mod custom_store;

#[test]
fn n24_a_custom_certificate_store_serves_a_secure_serializer() {
    custom_store::main().unwrap();
}
