import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { modelsQuery } from '@/features/generate/queries';
import { shortName } from '@/features/generate/ModelPicker';
import type { Job } from '@/types/api';
import { Anchor, Button, Chip, NumberInput, Select, SegmentedControl, Text, TextInput } from '@mantine/core';
import { useDebouncedValue } from '@mantine/hooks';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Link, useLocation, useNavigate } from 'react-router';
import { DataPicker } from './DataPicker';
import {
  canHave,
  EMPTY,
  formOf,
  HYPER,
  hyperOf,
  PARTS,
  requestOf,
  specOf,
  suffixIsGood,
  type Form,
  type Hyper,
  type Part,
} from './form';
import { LayerPicker } from './LayerPicker';
import { parseLayers } from './layers';
import css from './NewJobPage.module.css';
import { PreviewCard } from './PreviewCard';
import { createJob, filesQuery, layersQuery, type Training } from './queries';

const PREVIEW_AFTER_MS = 350;

export function NewJobPage() {
  const { t } = useTranslation();
  const navigate = useNavigate();
  const queryClient = useQueryClient();
  const again = (useLocation().state as { again?: Job } | null)?.again;
  const models = useQuery(modelsQuery);
  const bases = models.data?.filter((model) => !model.parent && model.family !== 'sd') ?? [];
  const [form, setForm] = useState<Form>(() => (again ? formOf(again) : EMPTY));
  const set = (fields: Partial<Form>) => setForm((before) => ({ ...before, ...fields }));

  const model = bases.find((each) => each.id === form.model) ?? bases.find((each) => each.available) ?? bases[0];
  const filled = { ...form, model: model?.id ?? null };
  const structure = useQuery({ ...layersQuery(model?.id ?? ''), enabled: model?.available === true });
  const parsed = model ? parseLayers(form.layers, model.n_layers) : null;
  const spec = specOf(filled);
  const file = useQuery(filesQuery).data?.find((each) => each.id === form.fileId);
  const training: Training = {
    hyperparameters: hyperOf(form),
    ...(file?.rows ? { data: { rows: file.rows, bytes: file.bytes } } : {}),
  };
  const readable = parsed?.ok && spec.parts.length > 0 ? JSON.stringify({ spec, training }) : null;
  const [settled] = useDebouncedValue(readable, PREVIEW_AFTER_MS);
  const shown = settled ? (JSON.parse(settled) as { spec: ReturnType<typeof specOf>; training: Training }) : null;
  const request = parsed?.ok ? requestOf(filled) : null;

  const starting = useMutation({
    mutationFn: createJob,
    onSuccess: async (job) => {
      await queryClient.invalidateQueries({ queryKey: ['jobs'] });
      await navigate(`/training/${job.id}`);
    },
  });

  const back = (
    <Anchor component={Link} to="/training" size="sm" className={css.back}>
      <Icon name="left" size={18} /> {t('job.allJobs')}
    </Anchor>
  );
  if (models.isSuccess && bases.length === 0) {
    return (
      <Page title={t('training.new')} above={back}>
        <Empty title={t('generate.noModels')} text={t('generate.noModelsText')}>
          <Button component={Link} to="/gpus" leftSection={<Icon name="chip" />}>
            {t('generate.connect')}
          </Button>
        </Empty>
      </Page>
    );
  }
  return (
    <Page title={t('training.new')} above={back} wide>
      <form
        className={css.columns}
        onSubmit={(event) => {
          event.preventDefault();
          if (request) starting.mutate(request);
        }}
      >
        <div className={css.steps}>
          <Card title={t('training.stepModel')}>
            {models.isError ? <ErrorNote error={models.error} /> : null}
            <Select
              aria-label={t('training.stepModel')}
              value={model?.id ?? null}
              onChange={(id) => set({ model: id })}
              data={bases.map((each) => ({
                value: each.id,
                label: shortName(each) + (each.available ? '' : ` · ${t('generate.offline')}`),
              }))}
              allowDeselect={false}
            />
          </Card>
          <Card title={t('training.stepData')}>
            <DataPicker value={form.fileId} onChange={(fileId) => set({ fileId })} />
          </Card>
          <Card title={t('training.stepLayers')}>
            <Method form={form} set={set} />
            <Parts form={form} set={set} has={(part) => hasPart(structure.data?.parts, part)} />
            {model ? (
              <LayerPicker n={model.n_layers} value={form.layers} onChange={(layers) => set({ layers })} />
            ) : null}
            <Finer form={form} set={set} />
          </Card>
          <Card>
            <TextInput
              label={t('training.suffix')}
              description={t('training.suffixText')}
              placeholder="captain"
              value={form.suffix}
              onChange={(event) => set({ suffix: event.currentTarget.value })}
              error={suffixIsGood(form.suffix) ? null : t('training.suffixBad')}
              maxLength={64}
              spellCheck={false}
              autoComplete="off"
            />
            <Fold title={t('training.stepHyper')} mark={HYPER.some((name) => form.hyper[name] !== null)}>
              <Hyperparameters form={form} set={set} />
            </Fold>
          </Card>
        </div>
        <aside className={css.summary} aria-label={t('training.preview')}>
          <Card title={t('training.preview')}>
            <PreviewCard
              model={model?.id ?? null}
              spec={shown && readable ? shown.spec : null}
              training={shown?.training ?? training}
            />
            {starting.error ? <ErrorNote error={starting.error} /> : null}
            {form.fileId ? null : (
              <Text size="sm" c="dimmed">
                {t('training.needData')}
              </Text>
            )}
            <Button type="submit" size="md" disabled={!request} loading={starting.isPending}>
              {t('training.start')}
            </Button>
          </Card>
        </aside>
      </form>
    </Page>
  );
}

interface Piece {
  form: Form;
  set: (fields: Partial<Form>) => void;
}

function Method({ form, set }: Piece) {
  const { t } = useTranslation();
  return (
    <div>
      <Text size="sm" fw={500} mb={4} id="method">
        {t('training.method')}
      </Text>
      <SegmentedControl
        aria-labelledby="method"
        value={form.method}
        onChange={(method) => set({ method: method })}
        data={[
          { value: 'lora', label: t('training.method_lora') },
          { value: 'full', label: t('training.method_full') },
        ]}
      />
      <Text size="sm" c="dimmed" mt={6}>
        {t(`training.method_${form.method}_text`)}
      </Text>
    </div>
  );
}

function Parts({ form, set, has }: Piece & { has: (part: Part) => boolean }) {
  const { t } = useTranslation();
  const offered = PARTS.filter((part) => canHave(form.method, part) && has(part));
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
            {t(`training.part_${part}`)}
          </Chip>
        ))}
      </div>
      <Text size="sm" c="dimmed" mt={6}>
        {offered
          .filter((part) => form.parts.includes(part))
          .map((part) => `${t(`training.part_${part}`)}: ${t(`training.part_${part}_text`)}`)
          .join(' · ')}
      </Text>
    </div>
  );
}

function Finer({ form, set }: Piece) {
  const { t } = useTranslation();
  return (
    <Fold title={t('training.finer')} mark={form.match !== '' || form.alpha !== null}>
      <div className={css.pair}>
        {form.method === 'lora' ? (
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
          </>
        ) : null}
        <TextInput
          label={t('training.match')}
          description={t('training.matchText')}
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

const FIELDS: Record<
  Hyper,
  {
    words: 'epochs' | 'batch' | 'rate' | 'length';
    text?: 'epochsText' | 'rateText' | 'lengthText';
    min: number;
    max: number;
    decimal: boolean;
  }
> = {
  n_epochs: { words: 'epochs', text: 'epochsText', min: 1, max: 100, decimal: false },
  batch_size: { words: 'batch', min: 1, max: 256, decimal: false },
  learning_rate: { words: 'rate', text: 'rateText', min: 0.000_001, max: 1, decimal: true },
  max_length_tokens: { words: 'length', text: 'lengthText', min: 8, max: 1_000_000, decimal: false },
};

function Hyperparameters({ form, set }: Piece) {
  const { t } = useTranslation();
  return (
    <div className={css.pair}>
      {HYPER.map((name) => {
        const { words, text, min, max, decimal } = FIELDS[name];
        return (
          <NumberInput
            key={name}
            label={t(`training.${words}`)}
            description={text ? t(`training.${text}`) : undefined}
            placeholder={t('training.auto')}
            value={form.hyper[name] ?? ''}
            onChange={(value) => set({ hyper: { ...form.hyper, [name]: typeof value === 'number' ? value : null } })}
            min={min}
            max={max}
            step={decimal ? 0.0001 : 1}
            allowDecimal={decimal}
            hideControls={decimal}
          />
        );
      })}
    </div>
  );
}

/** Until the model's structure is known, everything is offered. A tied head, for one, is none. */
function hasPart(parts: Record<string, number> | undefined, part: Part): boolean {
  return !parts || Object.keys(parts).some((name) => name === part || name.startsWith(`${part}.`));
}
