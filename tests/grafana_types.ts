// What deploy/grafana/fleetcast.json has to be, in Grafana's own types: `make dashboard-check` puts the file
// behind these lines and lets tsc read both. Unknown names are errors, as far as Grafana's types know them all.
import type { AnnotationQuery, Dashboard, FieldConfig, FieldConfigSource, Panel, VariableModel } from "@grafana/schema";
import type { Options as Bars } from "@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen";
import type { Options as Stat } from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type { FieldConfig as TableField, Options as Table } from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type { FieldConfig as LineField, Options as Lines } from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// The members of an enumeration are their values in a file of JSON.
type Plain<T> = T extends string
  ? `${T}`
  : T extends (infer Item)[]
    ? Plain<Item>[]
    : T extends object
      ? { [Name in keyof T]: Plain<T[Name]> }
      : T;

// The types of Prometheus' queries are its plugin's, not of this package.
interface Query {
  refId: string;
  datasource: { type: "prometheus"; uid: string };
  expr: string;
  legendFormat?: string;
  instant?: boolean;
  range?: boolean;
  format?: "time_series" | "table";
  editorMode?: "builder" | "code";
}

type Fields<Custom> = Omit<FieldConfigSource, "defaults"> & {
  defaults: Omit<FieldConfig, "custom"> & { custom?: Custom };
};
type Of<Type extends string, Options, Custom> = Omit<Panel, "type" | "options" | "fieldConfig" | "targets"> & {
  type: Type;
  options: Partial<Options>; // Grafana has a default for each
  fieldConfig: Fields<Custom>;
  targets: Query[];
};

type Board = Omit<Dashboard, "panels" | "templating" | "annotations"> & {
  panels: (
    | Of<"stat", Stat, Record<string, never>>
    | Of<"timeseries", Lines, LineField>
    | Of<"table", Table, TableField>
    | Of<"bargauge", Bars, Record<string, never>>
  )[];
  templating: { list: (VariableModel & { definition?: string })[] };
  annotations: { list: (AnnotationQuery & { expr?: string; step?: string; titleFormat?: string })[] };
};

export const dashboard: Plain<Board> =
