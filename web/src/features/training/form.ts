/** The training form as plain values, and the request that comes of them. */
import { layersJson, type Concept, type DataKind, type Layers, type LayerSpec } from '@/types/api';
import type { NewJob } from './queries';

/** Networks of a model that makes pictures; a model of text is one. */
export const COMPONENTS = ['unet', 'text_encoder'] as const;
export type Component = (typeof COMPONENTS)[number];

const PARTS = {
  text: ['attn', 'mlp', 'norm', 'embed', 'head'],
  unet: ['attn.self', 'attn.cross', 'mlp', 'norm', 'conv', 'time'],
  text_encoder: ['attn', 'mlp', 'norm', 'embed'],
} as const;
export type Part = (typeof PARTS)[keyof typeof PARTS][number];

export const METHODS = { text: ['lora', 'dora', 'full'], pictures: ['lora', 'full'] } as const;
export type Method = (typeof METHODS)['text'][number];
export const QUANTIZE = ['none', '8bit', '4bit'] as const;
export type Quantize = (typeof QUANTIZE)[number];

interface Numbers {
  min: number;
  max: number;
  decimal?: true;
}

/** What the API takes for each, beside "auto". */
export const NUMBERS = {
  n_epochs: { min: 1, max: 100 },
  batch_size: { min: 1, max: 256 },
  learning_rate: { min: 0.000_000_1, max: 10, decimal: true },
  max_length_tokens: { min: 8, max: 1_000_000 },
  warmup_ratio: { min: 0, max: 0.5, decimal: true },
  weight_decay: { min: 0, max: 1, decimal: true },
  max_gradient_norm: { min: 0, max: 1_000_000, decimal: true },
  micro_batch_rows: { min: 1, max: 256 },
  early_stop_patience: { min: 0, max: 100 },
  samples_every_steps: { min: 1, max: 1_000_000 },
  resolution: { min: 8, max: 4096 },
  min_snr_gamma: { min: 0, max: 1000, decimal: true },
  caption_dropout: { min: 0, max: 0.9, decimal: true },
} as const satisfies Record<string, Numbers>;

export const CHOICES = {
  schedule: ['linear', 'cosine', 'constant'],
  optimizer: ['adamw', 'adamw_8bit'],
  train_on: ['completions', 'all'],
} as const;

export const SWITCHES = ['packing', 'activation_checkpointing', 'prefix_cache', 'stream_layers'] as const;

export type NumberName = keyof typeof NUMBERS;
export type ChoiceName = keyof typeof CHOICES;
export type SwitchName = (typeof SWITCHES)[number];
export type HyperName = NumberName | ChoiceName | SwitchName;
export type HyperValue = number | string | boolean;

export const BASIC = {
  text: ['n_epochs', 'batch_size', 'learning_rate', 'max_length_tokens'],
  pictures: ['n_epochs', 'batch_size', 'learning_rate', 'resolution'],
} as const satisfies Record<DataKind, NumberName[]>;

/** What only one kind of model has. */
const OWN: Record<DataKind, readonly HyperName[]> = {
  text: ['max_length_tokens', 'train_on', 'packing', 'activation_checkpointing', 'prefix_cache', 'stream_layers'],
  pictures: ['resolution', 'min_snr_gamma', 'caption_dropout'],
};
export const hasHyper = (kind: DataKind, name: HyperName): boolean =>
  !OWN[kind === 'text' ? 'pictures' : 'text'].includes(name);

export const HYPER: readonly HyperName[] = [
  ...(Object.keys(NUMBERS) as NumberName[]),
  ...(Object.keys(CHOICES) as ChoiceName[]),
  ...SWITCHES,
];

export const MAX_SAMPLES = 8;
export const MAX_SAMPLE_CHARS = 2_000;
export const CLASS_PICTURES = 24; // where nobody says how many

/** What pictures without captions show. */
export interface ConceptForm {
  prompt: string;
  classPrompt: string;
  classPictures: number | null; // null: as the API has it
  priorWeight: number | null;
}

export interface Form {
  model: string | null; // a base model, or a tuned one that is trained further
  kind: DataKind | null; // of the models that what is chosen below suits; null: of whichever `model` is
  fileId: string | null;
  validationId: string | null;
  concept: ConceptForm;
  component: Component; // of models that make pictures
  method: Method;
  quantize: Quantize;
  parts: readonly Part[];
  layers: string;
  match: string;
  rank: number;
  alpha: number | null;
  rslora: boolean;
  json: string; // layer specs as JSON: where it is not empty, it stands for all of the fields above
  hyper: Partial<Record<HyperName, HyperValue>>; // what is not there is "auto"
  samples: readonly string[];
  suffix: string;
}

export const EMPTY: Form = {
  model: null,
  kind: 'text',
  fileId: null,
  validationId: null,
  concept: { prompt: '', classPrompt: '', classPictures: null, priorWeight: null },
  component: 'unet',
  method: 'lora',
  quantize: 'none',
  parts: ['attn', 'mlp'],
  layers: 'last:8',
  match: '',
  rank: 16,
  alpha: null,
  rslora: false,
  json: '',
  hyper: {},
  samples: [],
  suffix: '',
};

export const partsOf = (form: Form): readonly Part[] => PARTS[form.kind === 'pictures' ? form.component : 'text'];

/** What a network's layers are set to before anybody chooses. */
export const choiceOf = (component: Component): Pick<Form, 'component' | 'parts' | 'layers'> => ({
  component,
  parts: component === 'unet' ? ['attn.self', 'attn.cross'] : ['attn', 'mlp'],
  layers: 'all',
});

/** The form for another kind of model: what does not suit it begins anew, and the rest stays. */
export function fit(form: Form, kind: DataKind): Form {
  if (form.kind === kind) return form;
  if (form.kind === null) {
    const found = { ...form, kind };
    const sayable = found.parts.every((part) => partsOf(found).includes(part));
    return sayable || found.json ? found : { ...found, json: JSON.stringify([specOf(found)], null, 1) };
  }
  const { method, quantize, parts, layers, match, alpha, rslora, json } = EMPTY;
  const fresh = { ...form, kind, method, quantize, parts, layers, match, alpha, rslora, json };
  return kind === 'pictures' ? { ...fresh, ...choiceOf('unet') } : fresh;
}

const MATRICES: readonly Part[] = ['attn', 'attn.self', 'attn.cross', 'mlp', 'head', 'time'];

/** LoRA adapts matrices; norms, convolutions and the embedding have none. */
export const canHave = (method: Method, part: Part): boolean => method === 'full' || MATRICES.includes(part);

export function specOf(form: Form): LayerSpec {
  const low = form.method !== 'full';
  return {
    method: form.method,
    parts: form.parts.filter((part) => canHave(form.method, part)),
    layers: form.layers.trim(),
    ...(form.kind === 'pictures' ? { component: form.component } : {}),
    ...(form.match.trim() ? { match: form.match.trim() } : {}),
    ...(low ? { rank: form.rank } : {}),
    ...(low && form.alpha !== null ? { alpha: form.alpha } : {}),
    ...(low && form.rslora ? { rslora: true } : {}),
    ...(low && form.quantize !== 'none' ? { quantize: form.quantize } : {}),
  };
}

/** What the layer spec's language can say beyond these fields: finer parts, or several specs. Undefined: unreadable. */
export function layersOf(form: Form): Layers | undefined {
  if (form.json.trim() === '') {
    const spec = specOf(form);
    return spec.parts.length > 0 ? spec : undefined;
  }
  try {
    return layersJson.parse(JSON.parse(form.json));
  } catch {
    return undefined;
  }
}

export const suffixIsGood = (suffix: string): boolean => /^[A-Za-z0-9_-]{0,64}$/.test(suffix);

/** Only what was chosen: the rest is "auto" by itself. */
export const hyperOf = (form: Form): Record<string, HyperValue> =>
  Object.fromEntries(
    HYPER.flatMap((name) => {
      const value = form.hyper[name];
      return value === undefined || !hasHyper(form.kind ?? 'text', name) ? [] : [[name, value]];
    }),
  );

/** Null until it is said what the pictures show. */
export function conceptOf({ concept }: Form): Concept | null {
  const [prompt, classPrompt] = [concept.prompt.trim(), concept.classPrompt.trim()];
  if (!prompt) return null;
  return {
    prompt,
    ...(classPrompt ? { class_prompt: classPrompt } : {}),
    ...(classPrompt && concept.classPictures !== null ? { class_pictures: concept.classPictures } : {}),
    ...(classPrompt && concept.priorWeight !== null ? { prior_weight: concept.priorWeight } : {}),
  };
}

/** Null while something is still to be filled in. `captioned`: whether the pictures say themselves what they show. */
export function requestOf(form: Form, captioned = true): NewJob | null {
  const layers = layersOf(form);
  if (!form.model || !form.fileId || !layers || !suffixIsGood(form.suffix)) return null;
  const concept = form.kind === 'pictures' && !captioned ? conceptOf(form) : undefined;
  if (concept === null) return null;
  const samples = form.samples.map((prompt) => prompt.trim()).filter(Boolean);
  return {
    model: form.model,
    training_file: form.fileId,
    ...(form.validationId ? { validation_file: form.validationId } : {}),
    ...(form.suffix ? { suffix: form.suffix } : {}),
    ...(samples.length > 0 ? { sample_prompts: samples } : {}),
    ...(concept ? { concept } : {}),
    layers,
    method: { type: 'supervised', supervised: { hyperparameters: hyperOf(form) } },
  };
}

interface Earlier {
  model: string;
  training_file: string;
  validation_file?: string | null;
  user_provided_suffix: string | null;
  layers: LayerSpec[];
  hyperparameters?: Record<string, unknown>;
  sample_prompts?: string[];
  concept?: Concept | null | undefined;
}

/** "Train again with changes": what the job was started with, as far as the form can say it. */
export function formOf(job: Earlier): Form {
  const [spec, ...more] = job.layers;
  const known = (part: string): part is Part => Object.values(PARTS).some((parts) => parts.includes(part as never));
  const beyond = more.length > 0 || !spec?.parts.every(known);
  return {
    ...EMPTY,
    model: job.model,
    kind: null,
    concept: {
      prompt: job.concept?.prompt ?? '',
      classPrompt: job.concept?.class_prompt ?? '',
      classPictures: job.concept?.class_pictures ?? null,
      priorWeight: job.concept?.prior_weight ?? null,
    },
    fileId: job.training_file,
    validationId: job.validation_file ?? null,
    suffix: job.user_provided_suffix ?? '',
    samples: job.sample_prompts ?? [],
    hyper: Object.fromEntries(
      HYPER.flatMap((name) => {
        const value = job.hyperparameters?.[name];
        const given = typeof value === 'number' || typeof value === 'boolean' || typeof value === 'string';
        return given && value !== 'auto' ? [[name, value]] : [];
      }),
    ),
    ...(beyond ? { json: JSON.stringify(job.layers, null, 1) } : {}),
    ...(spec && !beyond
      ? {
          component: spec.component === 'text_encoder' ? 'text_encoder' : 'unet',
          method: spec.method,
          quantize: spec.quantize ?? 'none',
          parts: spec.parts.filter(known),
          layers: spec.layers,
          match: spec.match ?? '',
          rank: spec.rank ?? EMPTY.rank,
          alpha: spec.alpha ?? null,
          rslora: spec.rslora ?? false,
        }
      : {}),
  };
}
