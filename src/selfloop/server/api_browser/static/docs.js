// The API's browser: Swagger UI on this server's own OpenAPI document.

const browser = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  docExpansion: "list",
  filter: true,
  // Every route shows its own.
  defaultModelsExpandDepth: -1,
  deepLinking: true,
  // Would ask a host of theirs.
  validatorUrl: null,
  onComplete: () => {
    // Whoever signed in at the page in this tab need not type the key again.
    const key = sessionStorage.getItem("selfloop.key");
    if (key) browser.preauthorizeApiKey("BearerAuth", key);
  },
});
