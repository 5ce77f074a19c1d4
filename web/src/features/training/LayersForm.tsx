import { Fold } from '@/components/Fold';
import type { LayerSpec } from '@/types/api';
import { Button, Chip, NumberInput, SegmentedControl, Select, Switch, Text, Textarea, TextInput } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import {
  canHave,
  choiceOf,
  COMPONENTS,
  layersOf,
  METHODS,
  partsOf,
  QUANTIZE,
  specOf,
  type Form,
  type Method,
  type Part,
  type Quantize,
} from './form';
import css from './NewJobPage.module.css';

/** A part of the form, and how it changes the whole. */
export interface Piece {
  form: Form;
  set: (fields: Partial<Form>) => void;
}

export function MethodPicker({ form, set }: Piece) {
  const { t } = useTranslation();
  return (
    <div>
      <Text size="sm" fw={500} mb={4} id="method">
        {t('training.method')}
      </Text>
      <SegmentedControl
        aria-labelledby="method"
        value={form.method}
        onChange={(method) => set({ method })}
        data={METHODS[form.kind ?? 'text'].map((method) => ({ value: method, label: t(methodWords(method)) }))}
      />
      <Text size="sm" c="dimmed" mt={6}>
        {t(`${methodWords(form.method)}_text`)}
      </Text>
    </div>
  );
}

/** Which of its networks, where a model is more than one. */
export function ComponentPicker({ form, set }: Piece) {
  const { t } = useTranslation();
  return (
    <div>
      <Text size="sm" fw={500} mb={4} id="component">
        {t('pictured.component')}
      </Text>
      <SegmentedControl
        aria-labelledby="component"
        value={form.component}
        onChange={(component) => set(choiceOf(component))}
        data={COMPONENTS.map((component) => ({ value: component, label: t(`pictured.component_${component}`) }))}
      />
      <Text size="sm" c="dimmed" mt={6}>
        {t(`pictured.component_${form.component}_text`)}
      </Text>
    </div>
  );
}

export function Parts({ form, set, has }: Piece & { has: (part: Part) => boolean }) {
  const { t } = useTranslation();
  const own = form.kind === 'pictures' && form.component === 'unet';
  const offered = partsOf(form).filter((part) => canHave(form.method, part) && has(part));
  return (
    <div>
      <Text size="sm" fw={500} mb={6} id="parts">
        {t('training.parts')}
      </Text>
      <div className={css.parts} role="group" aria-labelledby="parts">
        {offered.map((part) => (
          <Chip
            key={part}
            checked={form.parts.includes(part)}
            onChange={(on) => set({ parts: on ? [...form.parts, part] : form.parts.filter((each) => each !== part) })}
          >
            {t(wordsOf(part, own))}
          </Chip>
        ))}
      </div>
      <Text size="sm" c="dimmed" mt={6}>
        {offered
          .filter((part) => form.parts.includes(part))
          .map((part) => `${t(wordsOf(part, own))}: ${t(`${wordsOf(part, own)}_text`)}`)
          .join(' · ')}
      </Text>
    </div>
  );
}

/** Of a UNet's parts, or of a text model's. */
const wordsOf = (part: Part, own: boolean) =>
  own
    ? (`pictured.part_${part.replace('.', '_')}` as 'pictured.part_conv')
    : (`training.part_${part}` as 'training.part_mlp');

export function Finer({ form, set }: Piece) {
  const { t } = useTranslation();
  const ofText = form.kind !== 'pictures';
  return (
    <Fold
      title={t('training.finer')}
      mark={form.match !== '' || form.alpha !== null || form.rslora || form.quantize !== 'none'}
    >
      <div className={css.pair}>
        {form.method !== 'full' ? (
          <>
            <NumberInput
              label={t('training.rank')}
              description={t('training.rankText')}
              value={form.rank}
              onChange={(value) => typeof value === 'number' && set({ rank: value })}
              min={1}
              max={1024}
              allowDecimal={false}
            />
            <NumberInput
              label={t('training.alpha')}
              description={t('training.alphaText')}
              value={form.alpha ?? ''}
              placeholder={String(2 * form.rank)}
              onChange={(value) => set({ alpha: typeof value === 'number' ? value : null })}
              min={0.1}
              max={65_536}
            />
            <Switch
              label={t('hyper.rslora')}
              description={t('hyper.rsloraText')}
              checked={form.rslora}
              onChange={(event) => set({ rslora: event.currentTarget.checked })}
            />
            {ofText ? (
              <Select
                label={t('hyper.quantize')}
                description={t('hyper.quantizeText')}
                value={form.quantize}
                onChange={(quantize) => set({ quantize: quantize as Quantize })}
                data={QUANTIZE.map((bits) => ({ value: bits, label: t(`hyper.quantize_${bits}`) }))}
                allowDeselect={false}
              />
            ) : null}
          </>
        ) : null}
        <TextInput
          label={t('training.match')}
          description={t(ofText ? 'training.matchText' : 'pictured.matchText')}
          value={form.match}
          onChange={(event) => set({ match: event.currentTarget.value })}
          maxLength={500}
          spellCheck={false}
          autoComplete="off"
        />
      </div>
    </Fold>
  );
}

/** The whole language, for who wants finer parts or several specs. It takes the place of the fields above. */
export function AsJson({ form, set }: Piece) {
  const { t } = useTranslation();
  const used = form.json.trim() !== '';
  return (
    <Fold title={t('training.asJson')} mark={used} open={used}>
      <Textarea
        label={t('training.json')}
        description={t('training.jsonText')}
        placeholder={JSON.stringify(specOf(form))}
        value={form.json}
        onChange={(event) => set({ json: event.currentTarget.value })}
        error={used && !layersOf(form) ? t('training.jsonBad') : null}
        autosize
        minRows={3}
        maxRows={16}
        maxLength={20_000}
        spellCheck={false}
        styles={{ input: { fontFamily: 'var(--mantine-font-family-monospace)' } }}
      />
      {used ? null : (
        <Button variant="default" size="compact-sm" mt={8} onClick={() => set({ json: written(specOf(form)) })}>
          {t('training.jsonFill')}
        </Button>
      )}
    </Fold>
  );
}

const written = (spec: LayerSpec) => JSON.stringify([spec], null, 1);

export const methodWords = (method: Method) =>
  method === 'dora' ? ('hyper.method_dora' as const) : (`training.method_${method}` as const);
