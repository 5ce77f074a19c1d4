import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { useTitle } from '@/components/Page';
import type { Family, Model } from '@/types/api';
import { ActionIcon, Button, Drawer, Skeleton, Text, Title, UnstyledButton } from '@mantine/core';
import { useDisclosure, useMediaQuery } from '@mantine/hooks';
import { useQuery } from '@tanstack/react-query';
import { useEffect, useLayoutEffect, useRef, useState, type RefObject } from 'react';
import { useTranslation } from 'react-i18next';
import { Link, useSearchParams } from 'react-router';
import { Composer, type ComposerHandle } from './Composer';
import {
  ask,
  forgetConversation,
  isOver,
  resume,
  retry,
  stop,
  useConversation,
  type Ask,
  type Turn,
} from './conversation';
import { Bands } from './Bands';
import { isNeutral, turnedBands } from './dials';
import { Dials } from './Dials';
import css from './GeneratePage.module.css';
import { ModelPicker, shortName } from './ModelPicker';
import { PictureForm } from './PictureForm';
import { modelsQuery } from './queries';
import { SamplingForm } from './SamplingForm';
import { setSettings, useSettings, type Settings } from './settings';
import { TurnView } from './TurnView';

const EXAMPLES = {
  text: ['generate.example1', 'generate.example2', 'generate.example3'],
  image: ['pictures.example1', 'pictures.example2', 'pictures.example3'],
} as const;

export function GeneratePage() {
  const { t } = useTranslation();
  useTitle(t('generate.title'));
  const models = useQuery(modelsQuery);
  const settings = useSettings();
  const turns = useConversation();
  const [params, setParams] = useSearchParams();
  const [opened, drawer] = useDisclosure(false);
  const narrow = useMediaQuery('(max-width: 64em)');
  const composer = useRef<ComposerHandle>(null);
  useEffect(resume, []);

  // ?model=… is how other screens say "chat with it", and &prompt=… what they would ask.
  const named = params.get('model');
  const [draft] = useState(() => params.get('prompt') ?? '');
  useEffect(() => {
    if (named) {
      setSettings({ model: named });
      setParams({}, { replace: true });
    }
  }, [named, setParams]);

  const model = choose(models.data, settings.model);
  const last = turns.at(-1);
  const running = last !== undefined && !isOver(last.phase);
  const how = model ? asked(model, settings) : null;

  if (models.isError && !models.data) {
    return (
      <div className={css.alone}>
        <ErrorNote error={models.error} retry={() => void models.refetch()} />
      </div>
    );
  }
  const panel = model ? (
    <div className={css.panel}>
      <ModelPicker models={models.data ?? []} model={model} onPick={(id) => setSettings({ model: id })} />
      <Dials values={settings.dials} image={how?.kind === 'image'} onChange={(dials) => setSettings({ dials })} />
      <Bands bands={settings.bands} blocks={how?.kind === 'image'} onChange={(bands) => setSettings({ bands })} />
      {how?.kind === 'image' ? (
        <PictureForm picture={settings.picture} onChange={(picture) => setSettings({ picture })} />
      ) : (
        <SamplingForm settings={settings} chat={how?.kind === 'chat'} />
      )}
    </div>
  ) : null;

  return (
    <div className={model ? css.page : `${css.page} ${css.bare}`}>
      <h1 className={css.hidden}>{t('generate.title')}</h1>
      <div className={css.talk}>
        {narrow && model ? (
          <div className={css.bar}>
            <Button
              variant="default"
              size="sm"
              className={css.pick}
              onClick={drawer.open}
              leftSection={<Icon name="dials" size={18} />}
            >
              <span className={css.pickName}>{shortName(model)}</span>
              {isNeutral(settings.dials) && turnedBands(settings.bands).length === 0 ? null : (
                <span className={css.dot} />
              )}
            </Button>
            <NewChat turns={turns} small />
          </div>
        ) : null}
        <div className={css.scroll}>
          {models.isPending ? (
            <div className={css.column} role="status">
              <Text c="dimmed">{t('app.loading', { what: t('generate.base') })}</Text>
              <Skeleton height={70} mt="md" />
            </div>
          ) : !model && turns.length === 0 ? (
            <Empty
              title={t('generate.noModels')}
              text={t('generate.noModelsText')}
              picture={<ModelPicker models={models.data ?? []} model={undefined} onPick={() => undefined} />}
            >
              <Button component={Link} to="/gpus" leftSection={<Icon name="chip" />}>
                {t('generate.connect')}
              </Button>
            </Empty>
          ) : turns.length === 0 ? (
            <Start composer={composer} image={how?.kind === 'image'} />
          ) : (
            <Conversation turns={turns} onRetry={how ? () => retry(how) : undefined} />
          )}
        </div>
        {model || turns.length > 0 ? (
          <div className={css.foot}>
            <Composer
              ref={composer}
              draft={draft}
              running={running}
              disabled={!how}
              label={t(LABELS[how?.kind ?? 'chat'])}
              placeholder={t(how?.kind === 'image' ? 'pictures.placeholder' : 'generate.placeholder')}
              onSend={(text) => how && ask(text, how)}
              onStop={stop}
            />
          </div>
        ) : null}
      </div>
      {narrow ? (
        <Drawer
          opened={opened}
          onClose={drawer.close}
          position="right"
          size="24rem"
          title={t('generate.settings')}
          closeButtonProps={{ 'aria-label': t('app.close') }}
        >
          {panel}
        </Drawer>
      ) : panel ? (
        <aside className={css.aside} aria-label={t('generate.settings')}>
          <NewChat turns={turns} />
          {panel}
        </aside>
      ) : null}
    </div>
  );
}

const KINDS: Record<Family, Ask['kind']> = { llama: 'chat', gpt2: 'completion', sd: 'image' };
const LABELS = { chat: 'generate.message', completion: 'generate.prompt', image: 'pictures.prompt' } as const;

function choose(models: readonly Model[] = [], wanted: string | null): Model | undefined {
  return (
    models.find((model) => model.id === wanted) ??
    models.find((model) => model.available && model.family !== 'sd') ??
    models.find((model) => model.available) ??
    models[0]
  );
}

function asked(model: Model, settings: Settings): Ask {
  const { dials, bands, sampling, system, picture } = settings;
  return { model: model.id, kind: KINDS[model.family], dials, bands, sampling, system, picture };
}

function NewChat({ turns, small = false }: { turns: readonly Turn[]; small?: boolean }) {
  const { t } = useTranslation();
  if (turns.length === 0) return null;
  if (small) {
    return (
      <ActionIcon variant="subtle" size={36} onClick={forgetConversation} aria-label={t('generate.newChat')}>
        <Icon name="plus" />
      </ActionIcon>
    );
  }
  return (
    <Button
      variant="subtle"
      size="sm"
      className={css.new}
      leftSection={<Icon name="plus" size={18} />}
      onClick={forgetConversation}
    >
      {t('generate.newChat')}
    </Button>
  );
}

function Start({ composer, image }: { composer: RefObject<ComposerHandle | null>; image: boolean }) {
  const { t } = useTranslation();
  return (
    <div className={css.start}>
      <Title order={2} className={css.startTitle}>
        {t(image ? 'pictures.startTitle' : 'generate.startTitle')}
      </Title>
      <Text c="dimmed" ta="center" maw={440}>
        {t(image ? 'pictures.startText' : 'generate.startText')}
      </Text>
      <div className={css.examples}>
        {EXAMPLES[image ? 'image' : 'text'].map((key) => (
          <UnstyledButton key={key} className={css.example} lang="en" onClick={() => composer.current?.write(t(key))}>
            {t(key)}
          </UnstyledButton>
        ))}
      </div>
    </div>
  );
}

/** Stays at the newest word, unless the reader has scrolled up. */
function Conversation({ turns, onRetry }: { turns: readonly Turn[]; onRetry: (() => void) | undefined }) {
  const { t } = useTranslation();
  const box = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  useLayoutEffect(() => {
    const column = box.current?.firstElementChild;
    if (!column) return;
    const follow = () => {
      if (box.current && follows.current) box.current.scrollTop = box.current.scrollHeight;
    };
    const observer = new ResizeObserver(follow); // words come, and pictures have their height once they are read
    observer.observe(column);
    return () => observer.disconnect();
  }, []);
  useLayoutEffect(() => {
    follows.current = true;
  }, [turns.length]);
  return (
    <div
      className={css.turns}
      ref={box}
      tabIndex={0}
      role="log"
      aria-label={t('generate.conversation')}
      onScroll={(event) => {
        const { scrollTop, scrollHeight, clientHeight } = event.currentTarget;
        follows.current = scrollHeight - scrollTop - clientHeight < 60;
      }}
    >
      <div className={css.column}>
        {turns.map((turn, index) => (
          <TurnView key={turn.id} turn={turn} onRetry={index === turns.length - 1 ? onRetry : undefined} />
        ))}
      </div>
    </div>
  );
}
