// The HTTP interface as /openapi.json describes it, drawn by Swagger UI. Nothing but this daemon is asked:
// without a validator address, Swagger UI would send the description to its maker's service.
window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  validatorUrl: "none",
  queryConfigEnabled: false,
});
